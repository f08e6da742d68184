"""Closed-form costs, usage, plots."""
