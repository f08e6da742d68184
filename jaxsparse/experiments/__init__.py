"""Comparisons of architectures, and measurements of speed."""
