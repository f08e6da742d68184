"""Mixtures of experts: routing, grouped products."""
