"""Pruning that stock transformers reloads: heads, FFN channels, layers, hidden width, and zeros."""
