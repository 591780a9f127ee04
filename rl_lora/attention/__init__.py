"""Attention of tokens that share their prefixes: in learning and prefill, and in decode steps with their KV cache."""
