# SPDX-License-Identifier: Apache-2.0
"""Bags of a table with changed rows equal those of the changed table."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh as mesh_lib
from jaxsparse.ops.memory.gathered_dot import gathered_dot_reference
from jaxsparse.ops.memory.sharded_bag import (
  sharded_gathered_dot,
  sharded_value_bag,
)
from jaxsparse.ops.memory.value_bag import value_bag_reference
from jaxsparse.ops.tables import quantized_table, row_delta
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.ops.tables.row_delta import DeltaTable

M, W, B, T, k, E, c = 136, 16, 8, 3, 5, 4, 2
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(M, W)).astype(np.float32)
ROWS = np.array([0, 3, 4, 70, M - 1], np.int32)
VALUES = RNG.normal(size=(len(ROWS), W)).astype(np.float32)
# Changed rows are read often, twice by some tokens, and by some tokens never.
SLOT = RNG.choice([0, 1, 2, 3, 4, 5, 69, 70, 71, M - 1], (B, T, k))
SLOT = SLOT.astype(np.int32)
SLOT[0, 0] = [1, 2, 5, 69, 71]
WEIGHT = RNG.normal(size=(B, T, k, c)).astype(np.float32)
POOL = RNG.integers(E, size=(B, T, k)).astype(np.int32)
COTANGENT = RNG.normal(size=(B, T, E, W)).astype(np.float32)
VECTOR = RNG.normal(size=(B, T, W)).astype(np.float32)
TO_PRODUCTS = RNG.normal(size=(B, T, k)).astype(np.float32)

# One device, and each scheme on eight.
CASES = {
  'alone': None,
  'columns': (1, 4, 2),
  'rows': (2, 2, 2),
  'grid': (2, 4, 1),
}


def flat(x):
  return jnp.asarray(x.reshape(-1, *x.shape[2:]))


def bag_reference(table, weight):
  pooled = value_bag_reference(table, *map(flat, (SLOT, weight, POOL)), E)
  return pooled.reshape(COTANGENT.shape)


def dot_reference(table, vector):
  products = gathered_dot_reference(table, flat(SLOT), flat(vector))
  return products.reshape(SLOT.shape)


def delta_bag(table, weight, slot, pool, scheme='columns'):
  return sharded_value_bag(table, slot, weight, pool, E, scheme=scheme)


def delta_dot(table, vector, slot, _, scheme='columns'):
  return sharded_gathered_dot(table, slot, vector, scheme=scheme)


KINDS = {
  'bag': (bag_reference, delta_bag, COTANGENT, WEIGHT),
  'dot': (dot_reference, delta_dot, TO_PRODUCTS, VECTOR),
}


@functools.cache
def run(kind, scheme):
  """The program of the result, and with `cotangent` of the gradients."""
  function = functools.partial(KINDS[kind][1], scheme=scheme)

  @jax.jit
  def with_gradients(table, factor, slot, pool, cotangent):
    def loss(values, factor):
      own = dataclasses.replace(table, values=values)
      y = function(own, factor, slot, pool)
      return (y * cotangent).sum(), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(table.values, factor)
    return y, *gradients

  return with_gradients


def results(kind, case, rows, values, chosen=None):
  """The result and the gradients of values and factor."""
  _, _, cotangent, factor = KINDS[kind]
  if CASES[case] is None:
    table = DeltaTable(*map(arrayed, (TABLE, rows, values, chosen)))
    args = map(jnp.asarray, (factor, SLOT, POOL, cotangent))
    return run(kind, 'columns')(table, *args)
  with jax.set_mesh(mesh_lib.make_mesh(*CASES[case])):
    put = jax.device_put
    table = put(TABLE, mesh_lib.table(case))
    table = DeltaTable(table, *map(arrayed, (rows, values, chosen)))
    tokens, split = jax.P(mesh_lib.TOKENS), ('model',)
    of_cotangent, of_factor = (
      (jax.P(mesh_lib.TOKENS, None, None, *split), tokens)
      if kind == 'bag'
      else (tokens, jax.P(mesh_lib.TOKENS, None, *split))
    )
    return run(kind, case)(
      table,
      put(factor, of_factor),
      put(SLOT, tokens),
      put(POOL, tokens),
      put(cotangent, of_cotangent),
    )


def arrayed(x):
  return None if x is None else jnp.asarray(x)


@functools.cache
def expected(kind):
  """The result, and gradients of the whole table and of the factor."""
  reference, _, cotangent, factor = KINDS[kind]

  def loss(table, factor):
    y = reference(table, factor)
    return (y * cotangent).sum(), y

  gradients, y = jax.grad(loss, (0, 1), has_aux=True)(
    jnp.asarray(TABLE).at[ROWS].add(VALUES), jnp.asarray(factor)
  )
  return y, *gradients


def check(actual, wanted):
  np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
  ('case', 'kind'),
  few(
    [('alone', 'bag'), ('columns', 'dot'), ('rows', 'bag'), ('grid', 'dot')],
    itertools.product(CASES, KINDS),
  ),
)
def test_gradient_is_that_of_the_rows_of_the_dense_table(case, kind):
  y, d_values, d_factor = results(kind, case, ROWS, VALUES)
  wanted, d_table, wanted_factor = expected(kind)
  check(y, wanted)
  check(d_values, d_table[ROWS])
  check(d_factor, wanted_factor)


@pytest.mark.parametrize(
  ('kind', 'case'),
  few(
    [('dot', 'alone'), ('bag', 'rows')],
    itertools.product(KINDS, ['alone', 'rows']),
  ),
)
def test_each_sequence_reads_the_delta_that_is_chosen_for_it(kind, case):
  reference, _, _, factor = KINDS[kind]
  other = np.array([3, 9], np.int32), VALUES[:2]
  rows, values = row_delta.stacked([None, (ROWS, VALUES), other], M, W, 6)
  chosen = np.array([0, 1, 2, 1, 0, 2, 2, 0], np.int32)
  y = np.asarray(results(kind, case, rows, values, chosen)[0])
  table = DeltaTable(*map(jnp.asarray, (TABLE, rows, values)))
  for i in range(3):
    whole = row_delta.changed_reference(table, i)
    wanted = np.asarray(reference(whole, factor))
    check(y[chosen == i], wanted[chosen == i])
  # To the bit where nothing is changed.
  plain = np.asarray(results(kind, case, rows[0], values[0])[0])
  assert np.array_equal(y[chosen == 0], plain[chosen == 0])


@pytest.mark.parametrize('lies', ['int8', 'host'])
def test_any_table_may_lie_below(lies):
  if lies == 'host':
    base = HostTable.of(TABLE)
    dense = jnp.asarray(TABLE)
  else:
    base = quantized_table.encoded(jnp.asarray(TABLE), lies)
    dense = base.dequantized()
  table = DeltaTable(base, jnp.asarray(ROWS), jnp.asarray(VALUES))
  assert table.shape == TABLE.shape
  y = jax.jit(delta_bag)(table, *map(jnp.asarray, (WEIGHT, SLOT, POOL)))
  check(y, bag_reference(dense.at[ROWS].add(VALUES), WEIGHT))


def test_deltas_of_other_rows_commute_and_shared_rows_are_counted():
  first = ROWS, VALUES
  second = np.array([1, 69], np.int32), VALUES[:2]
  third = np.array([1, 70], np.int32), VALUES[2:4]
  one, overlap = row_delta.summed([first, second])
  other, _ = row_delta.summed([second, first])
  assert overlap == 0
  assert all(map(np.array_equal, one, other))
  (rows, values), overlap = row_delta.summed([first, second, third])
  assert overlap == 2
  assert rows.tolist() == [0, 1, 3, 4, 69, 70, M - 1]
  dense = np.zeros((M, W), np.float32)
  for of, added in (first, second, third):
    dense[of] += added
  assert np.array_equal(values, dense[rows])
