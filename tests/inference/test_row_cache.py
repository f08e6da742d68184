# SPDX-License-Identifier: Apache-2.0
"""Copies of rows on a device that fetches its tables: forced on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from slot_models import MODELS, make_params

from jaxsparse.config.errors import UserError
from jaxsparse.inference import row_cache
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.row_cache import RowCaches, Size, begun, parse
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.ops.tables.quantized_table import encoded
from jaxsparse.run import table_leaves

MODEL = MODELS['small']
PARAMS = jax.tree.map(jnp.asarray, make_params(MODEL)['params'])
NAME = 'block_00/memory/value_table'
FLAG = '--row_cache'


def on_host(params, kind=''):
  """As a GPU gets them from files; `asked` notes the rows that it fetches."""
  rest, tables = table_leaves.split(params)
  table, asked = tables[NAME], []
  if kind:
    table = encoded(table, kind)
  host = HostTable.of(np.asarray(table.stored if kind else table))
  take = host.source.take

  def noting(ids):
    asked.append(np.unique(np.asarray(ids)))
    return take(ids)

  host.source.take = noting
  table = dataclasses.replace(table, stored=host) if kind else host
  return table_leaves.joined(rest, {NAME: table}), asked


def texts(params):
  programs = Programs.compile(MODEL, params, 2, 32, (16,), is_lazy=True)
  drawn = []
  for slot in range(2):
    programs.start(slot, JobSampling(seed=slot))
    pending = programs.prefill(slot, np.arange(1, 4 + slot), True)
    drawn.append(int(pending.result().tokens[slot]))
  for _ in range(12):
    pending = programs.decode(np.array([True, True]))
    drawn += pending.result().tokens.tolist()
  return drawn, programs


@pytest.mark.parametrize('kind', few([''], ['', 'int8']))
def test_texts_are_the_same_and_rows_come_from_the_cache(kind, monkeypatch):
  monkeypatch.setattr(row_cache, '_CALLS', 2)
  params, asked = on_host(PARAMS, kind)
  expected, programs = texts(params)
  assert programs.row_caches is None
  num_without = sum(map(len, asked))
  asked.clear()
  actual, programs = texts(begun(params, Size(rows=40), FLAG))
  assert actual == expected
  caches = programs.row_caches
  assert 0 < caches.num_hits < caches.num_reads
  # Rows of the exchanges among them.
  assert sum(map(len, asked)) < num_without
  # An exchange compiles nothing.
  assert programs.num_compiled == 4


def test_what_is_read_most_is_held():
  """Of a cache of 4 rows, by the counts of each exchange."""
  rows = np.arange(20, dtype=np.float32)[:, None]
  params = {'memory': {'value_table': HostTable.of(rows)}}
  params = begun(params, Size(rows=4), FLAG)
  caches = RowCaches(params)

  def held(*reads):
    nonlocal params
    for x in reads:
      caches._noted.append({'memory': jnp.asarray(x)})
    params = caches._exchanged(params)
    cache = params['memory']['value_table'].cache
    ids = np.asarray(cache.ids)
    found = np.asarray(cache.rows)[np.asarray(cache.place), 0]
    np.testing.assert_array_equal(found[ids >= 0], ids[ids >= 0])
    assert list(ids) == sorted(set(ids.tolist()))
    return [int(i) for i in ids if i >= 0]

  assert held([3, 5, -1], [3, 9]) == [3, 5, 9]
  assert (caches.num_reads, caches.num_hits) == (4, 0)
  assert held([1, 3], [9, 2]) == [1, 2, 3, 9]
  assert held(*[[17, 18]] * 5) == [3, 9, 17, 18]
  assert caches.num_hits > 0
  assert held(*[[0, 1, 2, 4]] * 9) == [0, 1, 2, 4]


def test_sizes():
  params, _ = on_host(PARAMS)
  width = params['block_00']['memory']['value_table'].shape[1]
  for size, rows in (
    (Size(rows=7), 7),
    (Size(rows=10**9), len(params['block_00']['memory']['value_table'])),
    (Size(num_bytes=8 * width * 4 + 5), 8),
  ):
    cache = begun(params, size, FLAG)['block_00']['memory']['value_table'].cache
    assert cache.rows.shape == (rows, width)
  assert begun(params, None, FLAG) is params
  assert row_cache.num_bytes(params) == 0


def test_what_the_flag_says():
  assert parse('', FLAG) is None
  assert parse('100000', FLAG) == Size(rows=100_000)
  assert parse('2GiB', FLAG) == Size(num_bytes=2**31)
  assert parse('5MB', FLAG) == Size(num_bytes=5_000_000)
  for wrong in ('0', '-1', '1.5GiB', '10 rows', 'GiB'):
    with pytest.raises(UserError, match=f'{FLAG} must be a number of rows'):
      parse(wrong, FLAG)


def test_where_tables_are_read_in_place_it_is_of_no_use():
  with pytest.raises(UserError, match='is for tables that a device fetches'):
    begun(PARAMS, Size(rows=1), FLAG)
  params, _ = on_host(PARAMS)
  with pytest.raises(UserError, match='must have room for a row of each'):
    begun(params, Size(num_bytes=1), FLAG)
