"""Work that each device does on its part of tables and of their state."""

from collections.abc import Callable
from typing import Any

import jax

from jaxsparse import mesh


def on_each_device(function: Callable, out_specs: Any) -> Callable:
  """`function` by `jax.shard_map`; itself with no mesh set."""
  if mesh.axis_sizes() is None:
    return function
  # What devices with copies of a table compute alike is not seen to be alike.
  return jax.shard_map(function, out_specs=out_specs, check_vma=False)


def specs_of(arrays: Any) -> Any:
  """How the arrays of a tree lie on the mesh in use."""
  return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arrays)
