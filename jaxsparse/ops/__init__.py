"""Pure functions on arrays, each with its reference beside it."""
