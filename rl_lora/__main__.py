"""`python -m rl_lora train ...` is `rl-lora train ...`; so is `accelerate launch -m rl_lora train ...`."""

from rl_lora.scripts.cli import main

if __name__ == "__main__":
    main()
