"""State, step, optimizers, the loop."""
