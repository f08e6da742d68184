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

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

# Bytes of rows that cross the link at once.
_WINDOW_BYTES = 2**20

# Askings that may wait to be collected, of all layers and devices.
_MOST_ASKED = 256


class Source:
  """The rows of a table on the host.

  Attributes:
    rows: an array [M, W] of numpy, such as a mapped file. Another may take its
      place; what is compiled stays.
  """

  def __init__(self, rows: np.ndarray | None):
    self.rows = rows
    # Rows that were asked for and have not been collected, by their tickets.
    self._asked: dict[int, list[concurrent.futures.Future]] = {}
    self._tickets = itertools.count()
    self._worker: concurrent.futures.ThreadPoolExecutor | None = None

  def ask(
    self,
    ids: np.ndarray | jax.Array,
    num_rows: np.ndarray | jax.Array,
    window: int,
  ) -> np.ndarray:
    """Begins to take the first `num_rows` of some rows, a window at a time.

    Returns:
      A ticket, by which `collect` finds them.
    """
    ids, num_rows = np.array(ids), int(np.asarray(num_rows))
    if self._worker is None:
      self._worker = concurrent.futures.ThreadPoolExecutor(1, 'rows')
    ticket = next(self._tickets) % 2**31
    self._asked[ticket] = [
      self._worker.submit(
        np.take, self.rows, ids[i : i + window], axis=0, mode='clip'
      )
      for i in range(0, num_rows, window)
    ]
    # What nobody collects, as in a program that was stopped.
    while len(self._asked) > _MOST_ASKED:
      self._asked.pop(next(iter(self._asked)), None)
    return np.array(ticket, np.int32)

  def collect(
    self,
    ids: np.ndarray | jax.Array,
    ticket: np.ndarray | jax.Array,
    index: np.ndarray | jax.Array,
    after: np.ndarray | jax.Array,
  ) -> np.ndarray:
    """A window of what was asked for.

    Args:
      ids: its rows, for one that was collected before: a program may be.
      ticket: what `ask` returned.
      index: of the window.
      after: not used; what it is made of comes before in a program.
    """
    del after
    ticket, index = int(np.asarray(ticket)), int(np.asarray(index))
    windows = self._asked.get(ticket, [])
    if index >= len(windows):
      return self.take(ids)
    if index + 1 == len(windows):
      self._asked.pop(ticket, None)
    taken = windows[index].result()
    rows = np.zeros((len(ids), taken.shape[1]), taken.dtype)
    rows[: len(taken)] = taken
    return rows

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
  asked = _missing(table, slot)
  rows, place = _taken(table, asked, functools.partial(_take, table))
  return rows, place.reshape(slot.shape).astype(slot.dtype), asked.num_missing


def ask(table: HostTable, slot: Int[Array, '*T']) -> 'Asked':
  """Begins to fetch the distinct rows of some reads; `collect` has them.

  The host takes them from its memory or its disk while the program runs on.
  """
  asked = _missing(table, slot)
  shape = jax.ShapeDtypeStruct((), jnp.int32)
  ids = asked.distinct[jnp.minimum(asked.order, len(asked.distinct) - 1)]
  source_ask = functools.partial(table.source.ask, window=asked.window)
  ticket = jax.pure_callback(source_ask, shape, ids, asked.num_missing)
  num_missing = asked.num_missing[None]
  return dataclasses.replace(
    asked, ticket=ticket[None], num_missing=num_missing
  )


def collect(
  table: HostTable, asked: 'Asked', after: jax.Array
) -> tuple[Shaped[Array, 'n W'], Int[Array, 'R']]:
  """What `fetched` returns of what was asked for, places flat.

  Args:
    table: the one that was asked.
    asked: by `ask`.
    after: a number; what it is made of comes before.
  """

  def take(window, ids, index):
    shape = jax.ShapeDtypeStruct((window, table.shape[1]), table.dtype)
    return jax.pure_callback(
      table.source.collect, shape, ids, asked.ticket[0], index, after
    )

  return _taken(table, asked, take)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
  """Rows that a device asks the host for; each array has a dimension.

  Attributes:
    distinct: rows that are read, ascending, then some beyond the table; one
      more, which is 0.
    place: of each read among these.
    order: places of `distinct` that are missing, in their order, then others.
    num_missing: how many are.
    ticket: of the asking.
    window: rows that are taken at once.
  """

  distinct: Int[Array, 'n']
  place: Int[Array, 'R']
  order: Int[Array, 'm']
  num_missing: jax.Array
  ticket: Int[Array, '1'] | None = None
  window: int = dataclasses.field(default=0, metadata=dict(static=True))


def _missing(table: HostTable, slot: jax.Array) -> Asked:
  num_rows, width = table.shape
  flat = slot.reshape(-1).astype(jnp.int32)
  size = min(flat.size, num_rows)
  if not flat.size:
    none = jnp.zeros(0, jnp.int32)
    return Asked(none, none, none, jnp.int32(0))
  # Unused entries come last, and lie beyond the table.
  distinct, place = jnp.unique(
    flat, return_inverse=True, size=size, fill_value=num_rows
  )
  is_missing = distinct < num_rows
  if table.cache is not None:
    is_missing &= ~_cached(table.cache, distinct)[0]
  num_missing = jnp.sum(is_missing, dtype=jnp.int32)
  row_bytes = width * np.dtype(table.dtype).itemsize
  window = min(table.window or max(1, _WINDOW_BYTES // row_bytes), size)
  # Those that are missing come first, in their order.
  order = jnp.argsort(~is_missing, stable=True)
  order = jnp.pad(order, (0, window), constant_values=size)
  distinct = jnp.pad(distinct, (0, 1), constant_values=0)
  place = place.reshape(-1).astype(jnp.int32)
  return Asked(distinct, place, order, num_missing, window=window)


def _cached(cache: RowCache, distinct: jax.Array):
  """Which rows the device has, and where."""
  at = jnp.searchsorted(cache.ids, distinct)
  at = jnp.minimum(at, len(cache.ids) - 1)
  return cache.ids[at] == distinct, cache.place[at]


def _taken(
  table: HostTable, asked: Asked, take: Callable
) -> tuple[jax.Array, jax.Array]:
  """Rows, from the cache or by `take` a window at a time, and places."""
  size, window = max(len(asked.distinct) - 1, 0), asked.window
  rows = jnp.zeros((size, table.shape[1]), table.dtype)
  if not size:
    return rows, asked.place
  if table.cache is not None:
    is_hit, at = _cached(table.cache, asked.distinct[:size])
    rows = jnp.where(is_hit[:, None], table.cache.rows[at], rows)
  num_missing = asked.num_missing.reshape(())

  def pass_(i, rows):
    into = jax.lax.dynamic_slice_in_dim(asked.order, i * window, window)
    is_own = i * window + jnp.arange(window) < num_missing
    new = take(window, jnp.where(is_own, asked.distinct[into], 0), i)
    into = jnp.where(is_own, into, size + jnp.arange(window))
    return rows.at[into].set(new, mode='drop', unique_indices=True)

  num_passes = -(-num_missing // window)
  return jax.lax.fori_loop(0, num_passes, pass_, rows), asked.place


def _take(
  table: HostTable, window: int, ids: jax.Array, index: jax.Array
) -> Any:
  del index
  shape = jax.ShapeDtypeStruct((window, table.shape[1]), table.dtype)
  return jax.pure_callback(table.source.take, shape, ids)
