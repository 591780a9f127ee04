"""Commands. Thin: they parse, and call `rl_lora`."""
