"""Learning: advantages, packed batches, objectives, and the optimizer step."""
