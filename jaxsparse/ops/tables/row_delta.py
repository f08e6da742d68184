# SPDX-License-Identifier: Apache-2.0
"""A table some of whose rows are changed, by differences that lie beside it.

It stands where the table stood, among the parameters and in the bags, which
read the table and add what they read of the differences. The table itself, an
array, a quantized one or one on the host, stays as it is: several models that
differ in some rows read one table, a sequence of a batch each.

Letters: M rows of the table, W their width, t changed rows, n deltas of which
each sequence of the B of a batch has one, T tokens, k reads of each.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxsparse import mesh
from jaxsparse.config.errors import require
from jaxsparse.ops.shard_map_vma import match_vma

# Row numbers, ascending, and what is added to each: [t] and [t, W].
Delta = tuple[np.ndarray, np.ndarray]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaTable:
  """A table [M, W] and differences of some of its rows.

  Attributes:
    base: an array, a `QuantizedTable`, a `HostTable` or another `DeltaTable`.
    rows: int32 [t], ascending; unused entries come last and are M. With
      `chosen` [n, t].
    values: [t, W], of each row; with `chosen` [n, t, W].
    chosen: int32 [B], which delta each sequence reads; None for the only one.
  """

  base: Any
  rows: Any
  values: Any
  chosen: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the table."""
    return tuple(self.base.shape)

  @property
  def dtype(self) -> np.dtype:
    """Of the table's numbers."""
    return self.base.dtype

  @property
  def ndim(self) -> int:
    return 2

  @property
  def nbytes(self) -> int:
    """Of the table and of what lies beside it."""
    beside = (self.rows, self.values)
    return self.base.nbytes + sum(x.nbytes for x in beside)

  @property
  def units(self) -> tuple[int, ...]:
    """The shape in what can't be cut, as the table has it."""
    return getattr(self.base, 'units', self.shape)

  @property
  def entries(self) -> tuple[tuple[str, ...], ...]:
    """As `mesh.entries` has those of the table."""
    if hasattr(self.base, 'entries'):
      return self.base.entries
    return mesh.entries(self.base)

  def specs(self, spec: jax.P) -> 'DeltaTable':
    """How the arrays lie where the table lies as `spec` says."""
    require(
      self.chosen is None,
      'several deltas in one batch need no mesh, or that of mesh.make_mesh.',
    )
    base = self.base.specs(spec) if hasattr(self.base, 'specs') else spec
    return DeltaTable(base, jax.P(), jax.P())

  def __len__(self) -> int:
    return self.shape[0]

  def of_reads(self, shape: tuple[int, ...]) -> Int[Array, '*T'] | None:
    """Which delta each token reads, of reads [B, ..., k] of this shape."""
    if self.chosen is None:
      return None
    chosen = mesh.reshard(self.chosen, mesh.act('B'))
    chosen = chosen.reshape(-1, *[1] * (len(shape) - 2))
    return jnp.broadcast_to(chosen, shape[:-1])


def in_int8(values: np.ndarray) -> dict[str, np.ndarray]:
  """Differences [t, W] in a quarter of the bytes of float32, for a file.

  A number is off by at most 1/254 of the largest of its row.

  Returns:
    'values', int8 [t, W], and by what they are multiplied, 'scale' [t].
  """
  values = np.asarray(values, np.float32)
  scale = np.abs(values).max(axis=1) / 127
  codes = np.rint(values / np.where(scale, scale, 1)[:, None])
  return dict(values=codes.astype(np.int8), scale=scale)


def find(
  rows: Int[Array, '*n t'],
  slot: Int[Array, 'T k'],
  chosen: Int[Array, 'T'] | None = None,
) -> tuple[Int[Array, 'T k'], Bool[Array, 'T k']]:
  """Where reads of a table meet changed rows.

  Args:
    rows: of a `DeltaTable`.
    slot: row of each read.
    chosen: which delta each token reads; None for the only one.

  Returns:
    Places in the deltas' rows, one delta after another, and whether the row is
    there at all; where it is not, the place is of no meaning but in range.
  """
  size = rows.shape[-1]
  flat = rows.reshape(-1)
  start = jnp.zeros(slot.shape, jnp.int32)
  if chosen is not None:
    start += chosen[:, None].astype(jnp.int32) * size
  flat, slot, low, high = match_vma(flat, slot, start, start + size)
  end = high

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    known = flat.at[middle].get(mode='clip')
    is_after = (known < slot) & (low < high)
    return jnp.where(is_after, middle + 1, low), jnp.where(
      is_after, high, middle
    )

  num_halvings = math.ceil(math.log2(size + 1))
  low, _ = jax.lax.fori_loop(0, num_halvings, halve, (low, high))
  place = jnp.minimum(low, flat.size - 1)
  return place, (low < end) & (flat.at[place].get(mode='clip') == slot)


def changed_reference(table: DeltaTable, delta: int = 0) -> jax.Array:
  """The whole table [M, W] with one delta added, in the type of its values."""
  t, width = table.values.shape[-2:]
  rows = table.rows.reshape(-1, t)[delta]
  values = table.values.reshape(-1, t, width)[delta]
  base = table.base
  dense = base.dequantized() if hasattr(base, 'dequantized') else base
  dense = dense.astype(jnp.promote_types(dense.dtype, values.dtype))
  return dense.at[rows].add(values.astype(dense.dtype), mode='drop')


def stacked(
  deltas: Sequence[Delta | None], num_rows: int, width: int, size: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Deltas of one table for one batch: `rows` [n, t] and `values` [n, t, W].

  Args:
    deltas: of each place; None for one that changes nothing, as the first of a
      server's places does.
    num_rows: M.
    width: W.
    size: t; 0 for that of the largest.
  """
  largest = max([1, *(len(rows) for rows, _ in filter(None, deltas))])
  size = size or largest
  if largest > size:
    raise ValueError(f'{largest} rows do not fit {size} places.')
  rows = np.full((len(deltas), size), num_rows, np.int32)
  values = np.zeros((len(deltas), size, width), np.float32)
  for i, delta in enumerate(deltas):
    if delta is not None:
      rows[i, : len(delta[0])] = delta[0]
      values[i, : len(delta[0])] = delta[1]
  return rows, values


def summed(deltas: Sequence[Delta]) -> tuple[Delta, int]:
  """Deltas of one table as one, and how many rows several of them change.

  Those that share no row may come in any order; where they do, their
  differences are added in f32, in order.
  """
  rows, count = np.unique(
    np.concatenate([rows for rows, _ in deltas]), return_counts=True
  )
  width = deltas[0][1].shape[1]
  values = np.zeros((len(rows), width), np.float32)
  for own, added in deltas:
    values[np.searchsorted(rows, own)] += np.asarray(added, np.float32)
  return (rows.astype(np.int32), values), int((count > 1).sum())
