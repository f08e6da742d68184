# SPDX-License-Identifier: Apache-2.0
"""Copies of the rows that are read most, on a device that fetches its tables.

A program fetches what is not among the copies, so they change how long it takes
and nothing else. It tells which rows its tokens read; between steps those that
were read most lately take the places of others, and no program is compiled for
that. Counts fade, so that the copies follow what is asked.

Letters: C rows of a table's cache, U rows that are exchanged at once.
"""

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config.errors import require
from jaxsparse.ops.tables.host_table import HostTable, RowCache
from jaxsparse.ops.tables.quantized_table import QuantizedTable
from jaxsparse.ops.tables.row_delta import DeltaTable
from jaxsparse.run import table_leaves

# Of padding, among the rows that tokens read.
NO_ROW = -1

# The flag of commands that have it.
HELP = (
  'rows of tables on the host or on file of which the device keeps copies, '
  'those that are read most: a number of each table, or a size such as 2GiB of '
  'all together; %(default)s: none'
)

# Calls of programs between two exchanges.
_CALLS = 32
# What counts are worth at the next exchange.
_FADING = 0.9
# Rows that are counted, by those that there is room for.
_KNOWN = 4
# Of rows that are exchanged at once.
_MOST_BYTES = 2**24

_UNITS = dict(KB=10**3, MB=10**6, GB=10**9, KiB=2**10, MiB=2**20, GiB=2**30)


@dataclasses.dataclass(frozen=True)
class Size:
  """How large caches are.

  Attributes:
    rows: of each table; 0 where bytes are given.
    num_bytes: of all tables together.
  """

  rows: int = 0
  num_bytes: int = 0


def parse(text: str, flag: str) -> Size | None:
  """What `--row_cache=100000` or `--row_cache=2GiB` says; None for nothing.

  Args:
    text: of the flag.
    flag: its name.

  Raises:
    UserError: it is no such number.
  """
  if not text:
    return None
  match = re.fullmatch(rf'(\d{{1,15}})({"|".join(_UNITS)})?', text)
  require(
    match is not None and int(match[1]) > 0,
    f'{flag} must be a number of rows such as 100000, or a size such as 512MiB '
    f'or 2GiB, got {text!r}.',
  )
  number = int(match[1])
  if match[2]:
    return Size(num_bytes=number * _UNITS[match[2]])
  return Size(rows=number)


def begun(params: dict, size: Size | None, flag: str) -> dict:
  """The parameters with empty caches in their tables on the host.

  Args:
    params: of a model.
    size: of the caches; None for none.
    flag: where it was said.

  Raises:
    UserError: no table is on the host for this device, or there is no room for
      a row of each.
  """
  if size is None:
    return params
  tables = _tables(params)
  require(
    bool(tables),
    f'{flag} is for tables that a device fetches from the host (--tables=file '
    'on a GPU or TPU), but here programs read them where they lie: leave it '
    'out.',
  )
  of_all = sum(map(_row_bytes, tables.values()))
  rows = size.rows or size.num_bytes // of_all
  require(
    rows > 0,
    f'{flag} must have room for a row of each table, {of_all:,} bytes, got '
    f'{size.num_bytes:,} bytes.',
  )
  return _with_tables(
    params,
    {
      path: dataclasses.replace(
        table, cache=RowCache.empty(min(rows, len(table)), table)
      )
      for path, table in tables.items()
    },
  )


def is_used(params: dict) -> bool:
  """Whether there are caches among the parameters, abstract ones too."""
  return any(table.cache is not None for table in _tables(params).values())


def reads(
  params: dict, sown: dict, segment_ids: jax.Array
) -> dict[str, jax.Array]:
  """The rows that tokens read, by the path of what has the tables.

  Args:
    params: of a model with caches.
    sown: 'intermediates' of a pass.
    segment_ids: [B, T] of its tokens, 0 for padding.
  """
  found: dict[str, list[jax.Array]] = collections.defaultdict(list)
  for name, block in sown.items():
    if 'memory' in block:
      own = params[name].get('memory', {})
      owner = f'{name}/memory' if 'value_table' in own else 'memory'
      rows = block['memory']['rows'][0]
      is_token = segment_ids[..., None] > 0
      found[owner].append(jnp.where(is_token, rows, NO_ROW).reshape(-1))
  return {owner: jnp.concatenate(rows) for owner, rows in found.items()}


class RowCaches:
  """What caches hold, and what they are to hold.

  Attributes:
    num_reads: distinct rows of calls that were counted.
    num_hits: those of them that were in a cache at the last exchange.
  """

  def __init__(self, params: dict):
    """Of parameters that `begun` has made."""
    self.num_reads = self.num_hits = 0
    self._noted: collections.deque[dict[str, jax.Array]] = collections.deque()
    self._counts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    self._num_calls = 0
    for path, table in _tables(params).items():
      if table.cache is not None:
        none = np.zeros(0, np.int32), np.zeros(0)
        self._counts[_owner(path)] = none

  def after(self, params: dict, rows: dict[str, jax.Array]) -> dict:
    """The parameters after a call that reads such rows; now and then new ones.

    Those that were given may then be gone.
    """
    self._noted.append(rows)
    self._num_calls += 1
    if self._num_calls < _CALLS:
      return params
    self._num_calls = 0
    return self._exchanged(params)

  def _exchanged(self, params: dict) -> dict:
    held = {
      _owner(path): np.asarray(table.cache.ids)
      for path, table in _tables(params).items()
      if table.cache is not None
    }
    self._count(held)
    changed = {}
    for path, table in _tables(params).items():
      if table.cache is not None:
        ids, counts = self._counts[_owner(path)]
        changed[path] = _exchange(table, ids, counts)
    return _with_tables(params, changed)

  def _count(self, held: dict[str, np.ndarray]) -> None:
    """Counts the calls that are done; nobody waits for one that is not."""
    batches: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    while self._noted and all(x.is_ready() for x in self._noted[0].values()):
      for owner, rows in self._noted.popleft().items():
        distinct = np.unique(np.asarray(rows))
        distinct = distinct[distinct != NO_ROW]
        batches[owner].append(distinct)
        self.num_reads += len(distinct)
        self.num_hits += int(np.isin(distinct, held[owner]).sum())
    for owner, (ids, counts) in self._counts.items():
      ids, place = np.unique(
        np.concatenate([ids, *batches[owner]]), return_inverse=True
      )
      total = np.zeros(len(ids))
      weights = [_FADING * counts, *(np.ones(len(x)) for x in batches[owner])]
      np.add.at(total, place, np.concatenate(weights))
      most = np.argsort(-total, kind='stable')[: _KNOWN * len(held[owner])]
      most.sort()
      self._counts[owner] = ids[most].astype(np.int32), total[most]


def _exchange(
  table: HostTable, ids: np.ndarray, counts: np.ndarray
) -> HostTable:
  """The table with the rows of most counts in its cache."""
  cache = table.cache
  held, place = np.asarray(cache.ids), np.asarray(cache.place)
  size = min(len(held), max(1, _MOST_BYTES // _row_bytes(table)))
  # What is held goes before others of the same count.
  order = np.lexsort((~np.isin(ids, held), -counts))
  wanted = ids[order[: len(held)]]
  new = wanted[~np.isin(wanted, held)][:size]
  if not len(new):
    return table
  of_held = np.zeros(len(held))
  known = np.isin(held, ids)
  of_held[known] = counts[np.searchsorted(ids, held[known])]
  # Those of least count leave, as many as come.
  old = np.argsort(of_held, kind='stable')[: len(new)]
  held, freed = held.copy(), place[old]
  held[old] = new
  order = np.argsort(held)
  rows = np.zeros((size, table.shape[1]), table.dtype)
  rows[: len(new)] = table.source.take(new)
  into = np.full(size, len(held), np.int32)
  into[: len(new)] = freed
  return dataclasses.replace(
    table,
    cache=RowCache(
      jnp.asarray(held[order]),
      jnp.asarray(place[order]),
      _put(cache.rows, into, rows),
    ),
  )


@functools.partial(jax.jit, donate_argnums=0)
def _put(held: jax.Array, place: jax.Array, rows: jax.Array) -> jax.Array:
  return held.at[place].set(rows, mode='drop')


def num_bytes(params: dict) -> int:
  """Of all caches."""
  caches = [table.cache for table in _tables(params).values()]
  return sum(x.nbytes for x in jax.tree.leaves(caches))


def _row_bytes(table: HostTable) -> int:
  return table.shape[1] * np.dtype(table.dtype).itemsize


def _owner(path: str) -> str:
  return path.rpartition('/')[0]


def _tables(params: dict) -> dict[str, HostTable]:
  """The tables on the host by their paths, quantized ones' rows as well."""
  _, tables = table_leaves.split(params)
  found = {path: _rows(x) for path, x in tables.items()}
  return {p: x for p, x in found.items() if isinstance(x, HostTable)}


def _rows(table: Any) -> Any:
  """What has the rows of a table that may be quantized or have deltas."""
  if isinstance(table, DeltaTable):
    return _rows(table.base)
  return table.stored if isinstance(table, QuantizedTable) else table


def _with_rows(table: Any, rows: HostTable) -> Any:
  if isinstance(table, DeltaTable):
    return dataclasses.replace(table, base=_with_rows(table.base, rows))
  if isinstance(table, QuantizedTable):
    return dataclasses.replace(table, stored=rows)
  return rows


def _with_tables(params: dict, changed: dict[str, HostTable]) -> dict:
  rest, tables = table_leaves.split(params)
  new = {path: _with_rows(tables[path], rows) for path, rows in changed.items()}
  return table_leaves.joined(rest, tables | new)
