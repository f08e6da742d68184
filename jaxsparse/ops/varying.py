"""Arrays inside jax.shard_map, and the mesh axes over which they vary."""

from typing import Any

import jax


def to_same_varying(*arrays: Any) -> tuple:
  """Marks all as varying over the manual mesh axes over which any does.

  Constants made inside `jax.shard_map` vary over none, but the carry of a loop
  must enter it as it leaves it. In a gradient, what is marked here is summed
  over the axes it did not vary over, so that a table that is the same on every
  device gets the gradient of all tokens.
  """

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))

  def mark(x):
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(mark, arrays)
