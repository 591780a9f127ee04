"""Rollouts: environments are played against a sampler, or show demonstrations."""
