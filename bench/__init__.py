"""Measurements: what is computed, how fast, and against what."""
