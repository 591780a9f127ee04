"""The policy: a frozen base model, its bank of adapters, its head and its chat format."""
