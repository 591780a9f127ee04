"""Adapters: their weights, the layers that apply them, and their format on disk."""
