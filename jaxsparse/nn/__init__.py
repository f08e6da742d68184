"""Linen modules: declare parameters, call ops."""
