"""Sampling: requests in, completions with their log-probabilities out."""
