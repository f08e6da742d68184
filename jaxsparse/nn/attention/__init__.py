"""Attention as modules: dense, composed and sparse, with their caches."""
