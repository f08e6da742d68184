"""Optax transformations that know no model."""
