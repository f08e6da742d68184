"""Attention over chosen key blocks, and its caches."""
