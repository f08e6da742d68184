"""Comparisons of architectures at equal budget."""
