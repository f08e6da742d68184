"""Sparse language models in JAX."""
