# SPDX-License-Identifier: Apache-2.0
"""Rows of sequences that move by themselves: each at an index of its own.

A batch of slots is fed T columns, of which a slot's first ones are tokens and
the others padding. A slot of padding alone stays where it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxsparse import mesh


def has_slots(cache: dict[str, Any]) -> bool:
  """Whether each sequence has an index of its own."""
  return cache['index'].ndim > 0


def num_tokens(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B']:
  """New tokens of each sequence, which come before its padding."""
  return (segment_ids > 0).sum(1, dtype=jnp.int32)


def advanced(
  index: Int[Array, '*B'], segment_ids: Int[Array, 'B T']
) -> Int[Array, '*B']:
  """The index after new tokens, of each sequence or of all together."""
  if index.ndim:
    return index + num_tokens(segment_ids)
  return index + segment_ids.shape[1]


def write_all(
  old: Shaped[Array, '*S'],
  rows: Shaped[Array, '*T'],
  index: Int[Array, ''],
  axis: int,
) -> Shaped[Array, '*S']:
  """`old` [B, ...] with T rows written along `axis` from one index on.

  A single sequence is written by a loop on a CPU. Its batch is of no matter to
  the products that read the rows, and XLA would write them a second time into
  an array without it: for each write all that is in the cache is copied twice.
  """

  def write(old, rows, index):
    return jax.lax.dynamic_update_slice_in_dim(old, rows, index, axis)

  def in_loop(old, rows, index):
    # Once, which XLA does not know, or it would undo the loop.
    return jax.lax.fori_loop(
      0, jnp.minimum(index + 1, 1), lambda _, old: write(old, rows, index), old
    )

  # What products read as it is; codes they read in parts.
  is_read = old.ndim > 3 and jnp.issubdtype(old.dtype, jnp.floating)
  is_alone = len(old) == 1 and mesh.axis_sizes() is None
  if is_read and is_alone and mesh.platform() == 'cpu':
    return in_loop(old, rows, index)
  return write(old, rows, index)


def write_rows(
  old: Shaped[Array, '*S'],
  rows: Shaped[Array, '*T'],
  index: Int[Array, 'B'],
  axis: int,
) -> Shaped[Array, '*S']:
  """`old` [B, ...] with T rows written along `axis` from each slot's index on.

  On a CPU slot by slot, which touches no other row; elsewhere by a scatter.
  """
  if len(index) == 1:
    return write_all(old, rows, index[0], axis)

  def one_by_one(old, rows, index):
    def write(b, old):
      start = [jnp.int32(0)] * old.ndim
      start[0], start[axis] = b, index[b]
      row = jax.lax.dynamic_slice_in_dim(rows, b, 1)
      return jax.lax.dynamic_update_slice(old, row, start)

    return jax.lax.fori_loop(0, len(index), write, old)

  def at_once(old, rows, index):
    def write(old, rows, index):
      return jax.lax.dynamic_update_slice_in_dim(old, rows, index, axis - 1)

    return jax.vmap(write)(old, rows, index)

  return jax.lax.platform_dependent(
    old, rows, index, cpu=one_by_one, default=at_once
  )


def rows_from(
  x: Shaped[Array, 'B S *D'], index: Int[Array, 'B'], *, length: int
) -> Shaped[Array, 'B {length} *D']:
  """`length` rows of each slot from its index on."""

  def cut(x, index):
    return jax.lax.dynamic_slice_in_dim(x, index, length)

  return jax.vmap(cut)(x, index)


def roll_all(
  rings: Shaped[Array, '*S'],
  rows: Shaped[Array, '*T'],
  index: Int[Array, ''],
  axis: int,
) -> tuple[Shaped[Array, '*R'], Shaped[Array, '*S']]:
  """`roll_rings` of sequences at one index, whose rows all stay."""
  num_entries = rings.shape[axis]
  seen = jnp.concatenate(
    [jnp.roll(rings, -(index % num_entries), axis), rows], axis
  )
  last = jax.lax.slice_in_dim(seen, -num_entries, None, axis=axis)
  return seen, jnp.roll(last, (index + rows.shape[axis]) % num_entries, axis)


def roll_rings(
  rings: Shaped[Array, '*S'],
  rows: Shaped[Array, '*T'],
  index: Int[Array, 'B'],
  count: Int[Array, 'B'],
  axis: int,
) -> tuple[Shaped[Array, '*R'], Shaped[Array, '*S']]:
  """Several new rows of each slot, whose last ones a ring keeps.

  Args:
    rings: [B, ...] with n entries along `axis`; the row of index i in entry i
      mod n.
    rows: T new ones of each slot.
    index: rows of each slot before.
    count: how many of the new ones are tokens.
    axis: that of rows.

  Returns:
    What the new tokens may read, n + T rows in the order of time, and the rings
    with the last n rows up to the last token.
  """
  num_entries = rings.shape[axis]

  def roll(ring, rows, index, count):
    by = index % num_entries
    seen = jnp.concatenate([jnp.roll(ring, -by, axis - 1), rows], axis - 1)
    last = jax.lax.dynamic_slice_in_dim(seen, count, num_entries, axis - 1)
    return seen, jnp.roll(last, (index + count) % num_entries, axis - 1)

  return jax.vmap(roll)(rings, rows, index, count)
