# SPDX-License-Identifier: Apache-2.0
"""The largest of many scores within a Triton kernel, exactly, without a sort.

A float's bits, read as an integer, have the order of floats once those of
negative ones are turned around. The m-th largest integer is then found bit by
bit from the top: 32 counts, however many candidates there are. It is the
bisection of radix selection (Alabi et al. 2012, "Fast k-selection algorithms
for graphics processing units").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt


def ordered(x: Float[Array, '*S']) -> UInt[Array, '*S']:
  """f32 as integers above 0 of the same order; a NaN counts as 0."""
  x = jnp.where(x == x, x, 0)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def best_places(
  order: UInt[Array, 'Q'], num_selected: int
) -> tuple[Bool[Array, 'Q'], Int[Array, 'Q']]:
  """Which are the largest, and a place for each of them.

  Args:
    order: integers; a candidate that does not count is 0.
    num_selected: how many to keep, at most as many as there are above 0.

  Returns:
    Whether each is kept, of equal ones the first, and how many are before it.
  """
  least = _nth_largest(order, num_selected)
  is_above, is_equal = order > least, order == least
  num_left = num_selected - is_above.astype(jnp.int32).sum()
  among_equals = jnp.cumsum(is_equal.astype(jnp.int32))
  is_kept = is_above | (is_equal & (among_equals <= num_left))
  return is_kept, jnp.cumsum(is_kept.astype(jnp.int32)) - 1


def _nth_largest(order: UInt[Array, 'Q'], n: int) -> UInt[Array, '']:
  def add_bit(i: Int[Array, ''], found: UInt[Array, '']):
    raised = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    count = (order >= raised).astype(jnp.int32).sum()
    return jnp.where(count >= n, raised, found)

  return jax.lax.fori_loop(0, 32, add_bit, jnp.uint32(0))
