"""The machine: memory, files, the terminal, threads. Knows nothing of models."""
