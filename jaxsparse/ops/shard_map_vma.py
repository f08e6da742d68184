# SPDX-License-Identifier: Apache-2.0
"""Arrays inside jax.shard_map, and the mesh axes over which they vary.

`jnp.argsort` and `jax.lax.sort_key_val` forget over which axes their order
varies (JAX 0.10.2 to 0.12.0.1). What is then indexed by it counts as alike on
all devices, and its gradient is summed over them too early, without a word from
`check_vma`. `jaxsparse.ops` sorts by the two functions here, which mark it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def varying_axes(x: Array) -> frozenset[str]:
  """The manual mesh axes over which `x` is marked as varying."""
  return jax.typeof(x).manual_axis_type.varying


def match_vma(*arrays: Any) -> tuple:
  """Marks all as varying over the manual mesh axes over which any does.

  Constants made inside `jax.shard_map` vary over none, but the carry of a loop
  must enter it as it leaves it. In a gradient, what is marked here is summed
  over the axes it did not vary over, so that a table that is the same on every
  device gets the gradient of all tokens.
  """
  axes = frozenset().union(*map(varying_axes, jax.tree.leaves(arrays)))

  def mark(x: Array):
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(mark, arrays)


def argsort(keys: Shaped[Array, '*S'], axis: int = -1) -> Int[Array, '*S']:
  """`jnp.argsort`, stable; the order varies over devices as `keys` does."""
  order, _ = match_vma(jnp.argsort(keys, axis=axis, stable=True), keys)
  return order


def sort_key_val(
  keys: Shaped[Array, ' n'], values: Shaped[Array, ' n']
) -> tuple[Shaped[Array, ' n'], Shaped[Array, ' n']]:
  """`jax.lax.sort_key_val`, stable; both vary over devices as either does."""
  keys, values = match_vma(keys, values)
  return match_vma(keys, *jax.lax.sort_key_val(keys, values))[1:]
