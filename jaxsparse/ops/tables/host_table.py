# SPDX-License-Identifier: Apache-2.0
"""A table that no device holds: the rows that a step reads are fetched.

It stands where the table's array stood, among the parameters and in the bags.
The rows of all tokens of a call are deduplicated on the device; the host takes
each distinct one from its memory or a mapped file, a window of a fixed number
of rows at a time, as many windows as the call needs. So what crosses the link
follows the distinct rows, and no number of them is too many.

A device may keep a copy of some rows, such as those that are read most. It is
only read: the host's rows do not change while there is one.

Letters: M rows of the table, W their width, C rows of the cache, n reads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

# Bytes of rows that cross the link at once.
_WINDOW_BYTES = 2**20


class Source:
  """The rows of a table on the host.

  Attributes:
    rows: an array [M, W] of numpy, such as a mapped file. Another may take its
      place; what is compiled stays.
  """

  def __init__(self, rows: np.ndarray | None):
    self.rows = rows

  def take(self, ids: np.ndarray | jax.Array) -> np.ndarray:
    """Rows by their numbers; numpy alone, as JAX waits for it."""
    return np.take(self.rows, np.asarray(ids), axis=0, mode='clip')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCache:
  """Copies of some rows, on the device.

  Attributes:
    ids: int32 [C], their numbers, ascending and distinct; what is below 0 is no
      row's. Of what JAX has in a tree's place of an array, too.
    place: int32 [C], of each among `rows`.
    rows: [C, W], in any order, so that one may be replaced where it is.
  """

  ids: Any
  place: Any
  rows: Any

  @classmethod
  def empty(cls, size: int, table: 'HostTable') -> 'RowCache':
    """Room for `size` rows of a table, and none of them."""
    return cls(
      jnp.arange(-size, 0, dtype=jnp.int32),
      jnp.arange(size, dtype=jnp.int32),
      jnp.zeros((size, table.shape[1]), table.dtype),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostTable:
  """A table [M, W] on the host.

  Attributes:
    source: what has its rows.
    shape: M and W.
    dtype: of a value.
    cache: rows that are on the device, too; None for none.
    window: rows that are fetched at once; 0 for a default.
  """

  source: Source = dataclasses.field(metadata=dict(static=True))
  shape: tuple[int, int] = dataclasses.field(metadata=dict(static=True))
  dtype: np.dtype = dataclasses.field(metadata=dict(static=True))
  cache: RowCache | None = None
  window: int = dataclasses.field(default=0, metadata=dict(static=True))

  @classmethod
  def of(cls, rows: np.ndarray, window: int = 0) -> 'HostTable':
    """The table of rows [M, W] of numpy, which are not copied."""
    return cls(Source(rows), rows.shape, rows.dtype, window=window)

  @property
  def ndim(self) -> int:
    return 2

  def __len__(self) -> int:
    return self.shape[0]

  def with_cache(self, ids: np.ndarray) -> 'HostTable':
    """The table with copies of these rows on the default device."""
    ids = np.unique(ids).astype(np.int32)
    place = jnp.arange(len(ids), dtype=jnp.int32)
    cache = RowCache(
      jnp.asarray(ids), place, jnp.asarray(self.source.take(ids))
    )
    return dataclasses.replace(self, cache=cache)


def reads_host_memory() -> bool:
  """Whether programs of the default device read the host's memory in place."""
  return jax.default_backend() == 'cpu'


def shown(
  rows: np.ndarray, array: Callable[[], jax.Array]
) -> jax.Array | HostTable:
  """What stands for a table on the host: its array, or what fetches its rows.

  Args:
    rows: of the table.
    array: makes the array that shows them without a copy, on a CPU.
  """
  return array() if reads_host_memory() else HostTable.of(rows)


def fetched(
  table: HostTable, slot: Int[Array, '*T']
) -> tuple[Shaped[Array, 'n W'], Int[Array, '*T']]:
  """The distinct rows of some reads, and each read's place among them.

  Returns:
    A table of n rows, as many as there are reads or rows of the table, and
    `slot` in its numbers.
  """
  rows, place, _ = fetch(table, slot)
  return rows, place


def fetch(
  table: HostTable, slot: Int[Array, '*T']
) -> tuple[Shaped[Array, 'n W'], Int[Array, '*T'], Int[Array, '']]:
  """`fetched`, and how many rows the host was asked for."""
  num_rows, width = table.shape
  flat = slot.reshape(-1).astype(jnp.int32)
  size = min(flat.size, num_rows)
  rows = jnp.zeros((size, width), table.dtype)
  if not flat.size:
    return rows, slot, jnp.int32(0)
  # Unused entries come last, and lie beyond the table.
  distinct, place = jnp.unique(
    flat, return_inverse=True, size=size, fill_value=num_rows
  )
  is_missing = distinct < num_rows
  if table.cache is not None:
    cached = table.cache
    at = jnp.searchsorted(cached.ids, distinct)
    at = jnp.minimum(at, len(cached.ids) - 1)
    is_hit = cached.ids[at] == distinct
    rows = jnp.where(is_hit[:, None], cached.rows[cached.place[at]], rows)
    is_missing &= ~is_hit
  num_missing = jnp.sum(is_missing, dtype=jnp.int32)
  row_bytes = width * np.dtype(table.dtype).itemsize
  window = table.window or max(1, _WINDOW_BYTES // row_bytes)
  window = min(window, size)
  # Those that are missing come first, in their order.
  order = jnp.argsort(~is_missing, stable=True)
  order = jnp.pad(order, (0, window), constant_values=size)
  distinct = jnp.pad(distinct, (0, 1), constant_values=0)
  take = functools.partial(_take, table, window)

  def pass_(i, rows):
    into = jax.lax.dynamic_slice_in_dim(order, i * window, window)
    is_own = i * window + jnp.arange(window) < num_missing
    new = take(jnp.where(is_own, distinct[into], 0))
    into = jnp.where(is_own, into, size + jnp.arange(window))
    return rows.at[into].set(new, mode='drop', unique_indices=True)

  num_passes = -(-num_missing // window)
  rows = jax.lax.fori_loop(0, num_passes, pass_, rows)
  return rows, place.reshape(slot.shape).astype(slot.dtype), num_missing


def _take(table: HostTable, window: int, ids: jax.Array) -> Any:
  shape = jax.ShapeDtypeStruct((window, table.shape[1]), table.dtype)
  return jax.pure_callback(table.source.take, shape, ids)
