"""Attention over all keys: dense, composed heads, libraries' kernels."""
