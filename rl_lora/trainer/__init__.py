"""The training run: checks before it, the loop, and checkpoints."""
