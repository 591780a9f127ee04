"""`rl-lora report`, also where it is not installed: `python scripts/report.py`."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, whose names are common ones
    from rl_lora.scripts.cli import main

    main("report")
