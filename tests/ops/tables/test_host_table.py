# SPDX-License-Identifier: Apache-2.0
"""Tables on the host: what is fetched is what a device's table has."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsparse.ops.memory.sharded_bag import (
  sharded_gathered_dot,
  sharded_value_bag,
)
from jaxsparse.ops.tables.host_table import HostTable, ask, collect, fetch

M, W, T, k = 100, 8, 6, 5


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def draw_slots(rng):
  slot = rng.integers(0, M, (T, k), np.int32)
  slot[0] = [0, M - 1, 7, 7, 0]
  return slot


@pytest.mark.parametrize(
  ('window', 'cached'),
  [(0, ()), (4, ()), (4, range(8)), (3, range(M)), (1, [0, 7, 99])],
)
def test_rows_and_misses_are_those_of_numpy(rng, window, cached):
  rows, slot = rng.normal(size=(M, W)).astype(np.float32), draw_slots(rng)
  asked = []
  table = HostTable.of(rows, window)
  if len(cached):
    table = table.with_cache(np.array(cached))
  take = table.source.take
  table.source.take = lambda ids: asked.append(np.asarray(ids)) or take(ids)
  found, place, num_missing = jax.jit(fetch)(table, slot)
  np.testing.assert_array_equal(found[place], rows[slot])
  missing = sorted(set(slot.ravel().tolist()) - set(cached))
  assert num_missing == len(missing)
  if window:
    assert len(asked) == -(-len(missing) // window)
  assert [i for ids in asked for i in ids][: len(missing)] == missing


@pytest.mark.parametrize('window', [0, 3])
def test_rows_that_were_asked_for_are_collected_by_whoever_comes(rng, window):
  """Once as they were taken then; again, or later than kept, anew."""
  rows, slot = rng.normal(size=(M, W)).astype(np.float32), draw_slots(rng)
  table = HostTable.of(rows.copy(), window).with_cache(np.arange(8))
  asked = jax.jit(ask)(table, slot)
  for future in table.source._asked[int(asked.ticket[0])]:
    future.result()
  table.source.rows = 0 * rows
  get = jax.jit(collect)
  for expected in (rows, np.where(np.arange(M)[:, None] < 8, rows, 0)):
    found, place = get(table, asked, jnp.float32(0))
    np.testing.assert_array_equal(
      found[place.reshape(slot.shape)], expected[slot]
    )
    assert not table.source._asked


def test_what_nobody_collects_is_not_kept(rng):
  table = HostTable.of(rng.normal(size=(M, W)).astype(np.float32))
  for _ in range(300):
    table.source.ask(np.arange(4), np.array(4), window=4)
  assert len(table.source._asked) == 256
  assert table.source.collect(np.array([5]), *[np.array(0)] * 3).tolist() == [
    table.source.rows[5].tolist()
  ]


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_bags_and_products_of_it_are_those_of_the_table(rng, dtype):
  rows, slot = rng.normal(size=(M, W)).astype(dtype), draw_slots(rng)
  weight = jnp.asarray(rng.normal(size=(T, k, 2)), jnp.float32)
  pool = jnp.asarray(rng.integers(0, 2, (T, k), np.int32))
  vector = jnp.asarray(rng.normal(size=(T, W)), jnp.float32)

  @jax.jit
  def run(table, slot, weight, vector):
    def loss(weight, vector):
      held = jax.lax.stop_gradient(table)
      pooled = sharded_value_bag(held, slot, weight, pool, 2)
      products = sharded_gathered_dot(held, slot, vector)
      return jnp.sum(jnp.sin(pooled)) + jnp.sum(jnp.sin(products))

    return jax.value_and_grad(loss, (0, 1))(weight, vector)

  expected = run(jnp.asarray(rows), slot, weight, vector)
  for table in (
    HostTable.of(rows),
    HostTable.of(rows, 4).with_cache(np.arange(8)),
  ):
    actual = run(table, slot, weight, vector)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
      np.testing.assert_array_equal(a, b)


def test_another_source_or_cache_compiles_nothing(rng):
  rows = rng.normal(size=(M, W)).astype(np.float32)
  table = HostTable.of(rows).with_cache(np.arange(8))
  count = jax.jit(functools.partial(fetch))
  count(table, draw_slots(rng))
  table.source.rows = 2 * rows
  again = table.with_cache(np.arange(8, 16))
  found, _, _ = count(again, draw_slots(rng))
  assert count._cache_size() == 1
  assert len(found) == T * k
