"""Figures of samples and of steps. Knows no model."""
