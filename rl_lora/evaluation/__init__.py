"""Adapters side by side on held-out problems."""
