"""Caches, decoding, sampling."""
