# SPDX-License-Identifier: Apache-2.0
"""A bf16 table takes half the memory of an f32 one on a CPU, too.

Programs that read one hold no copy of it in f32, nor in 16 bits, and what they
compute is what they compute of an f32 table of the same values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh as mesh_lib
from jaxsparse.ops import chunking
from jaxsparse.ops.experts.grouped_matmul import assigned_matmul, grouped_matmul
from jaxsparse.ops.memory.gathered_dot import gathered_dot
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.memory.sharded_bag import (
  sharded_gathered_dot,
  sharded_value_bag,
)
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.training.optimizers import row_updates

# Rows enough that a token's reads are little beside them.
M, W, T, k, X = 2**15, 128, 256, 24, 128
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(M, W)), jnp.bfloat16)
SLOT = jnp.asarray(RNG.integers(M, size=(T, k)), jnp.int32)
POOL = jnp.asarray(RNG.integers(4, size=(T, k)), jnp.int32)
NUM_VALID = jnp.asarray(RNG.integers(k, size=T), jnp.int32)
WEIGHT = jnp.asarray(RNG.normal(size=(T, k, 2)), jnp.float32)
VECTOR = jnp.asarray(RNG.normal(size=(T, W)), jnp.float32)
SIZES = jnp.full(X, T // X, jnp.int32)
EXPERT = jnp.asarray(RNG.integers(X, size=4), jnp.int32)


def bag(table, weight, pool=None, num_pools=1, **options):
  return value_bag(table, SLOT, weight, pool, num_pools, **options)


def products(table, vector, **options):
  return gathered_dot(table, SLOT, vector, **options)


def grouped(experts, rows):
  return grouped_matmul(rows, experts, SIZES, implementation='loop')


def as_experts(table):
  return table.reshape(X, -1, W)


def of_experts(product, table, *args):
  return product(as_experts(table), *args)


def gradient(function):
  """With respect to what meets the table."""
  return jax.grad(lambda table, x: jnp.square(function(table, x)).sum(), 1)


ROWS = jnp.asarray(RNG.normal(size=(T, M // X)), jnp.float32)
PROGRAMS = {
  'bag': bag,
  'pools': lambda table, weight: bag(table, weight, POOL, 4),
  'in use': lambda table, weight: bag(table, weight, num_valid=NUM_VALID),
}
CASES = {
  **{name: (program, WEIGHT) for name, program in PROGRAMS.items()},
  **{
    f'{name}, gradient': (gradient(program), WEIGHT)
    for name, program in PROGRAMS.items()
  },
  'products': (products, VECTOR),
  'products, gradient': (gradient(products), VECTOR),
  'products in use': (
    functools.partial(products, num_valid=NUM_VALID), VECTOR
  ),
  'experts': (
    gradient(functools.partial(of_experts, grouped)), ROWS
  ),
  'few tokens': (
    functools.partial(
      of_experts,
      lambda experts, rows: assigned_matmul(rows, experts, EXPERT),
    ),
    ROWS[:4],
  ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
  monkeypatch.setattr(chunking, 'CHUNK_BYTES_CPU', 2**18)


def compile_without_copy(function, *args, **options):
  """The program, which has no room for a third of the table's bytes."""
  program = jax.jit(function, **options).lower(*args).compile()
  memory = program.memory_analysis()
  assert memory.temp_size_in_bytes < TABLE.nbytes / 3
  return program


@pytest.mark.parametrize('name', CASES)
def test_programs_hold_no_other_copy(name):
  function, x = CASES[name]
  actual = compile_without_copy(function, TABLE, x)(TABLE, x)
  expected = jax.jit(function)(TABLE.astype(jnp.float32), x)
  atol = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('scheme', ['columns', 'rows'])
def test_devices_hold_no_other_copy_of_their_part(scheme):
  """Bag and products with their gradients; a device has half of the table."""

  def loss(weight, vector, table):
    table = jax.lax.stop_gradient(table)
    pooled = sharded_value_bag(table, slot, weight, scheme=scheme)
    scale = sharded_gathered_dot(table, slot, vector, scheme=scheme)
    return jnp.square(pooled).sum() + jnp.square(scale).sum()

  mesh = mesh_lib.make_mesh(1, 2, 1, devices=jax.devices()[:2])
  with jax.set_mesh(mesh):
    tokens = jax.P(mesh_lib.TOKENS)
    slot, weight, vector = (
      jax.sharding.reshard(x.reshape(2, -1, *x.shape[1:]), tokens)
      for x in (SLOT, WEIGHT, VECTOR)
    )
    vector = jax.sharding.reshard(vector, jax.P(mesh_lib.TOKENS, None, 'model'))
    table = jax.sharding.reshard(TABLE, mesh_lib.table(scheme))
    program = jax.jit(jax.grad(loss, (0, 1))).lower(weight, vector, table)
    memory = program.compile().memory_analysis()
  assert memory.temp_size_in_bytes < TABLE.nbytes / 2


@pytest.mark.parametrize('has_key', [False, True])
def test_rows_change_in_place(has_key):
  """By a step that first reads them, with and without stochastic rounding."""
  rows = np.sort(RNG.choice(M, 50, replace=False)).astype(np.int32)
  slot = jnp.append(rows, jnp.arange(M, M + 6, dtype=jnp.int32))
  value = jnp.asarray(RNG.normal(size=(56, W)), jnp.float32)
  key = jax.random.key(0) if has_key else None

  def step(table, slot, value, key):
    return row_updates.apply_updates(table, RowGradient(slot, value), key)

  expected = np.array(TABLE, np.float32)
  expected[rows] += value[:50]
  args = (slot, value, key)
  program = compile_without_copy(step, TABLE, *args, donate_argnums=0)
  actual = np.asarray(program(TABLE + 0, *args).astype(jnp.float32))
  untouched = np.delete(np.arange(M), rows)
  np.testing.assert_array_equal(actual[untouched], expected[untouched])
  resolution = 2.0**-8 if not has_key else 2.0**-7
  np.testing.assert_allclose(actual, expected, rtol=resolution)
  assert (actual[rows] != np.asarray(TABLE[rows], np.float32)).mean() > 0.9


def test_a_step_on_no_row_changes_nothing():
  update = RowGradient(M + jnp.arange(4, dtype=jnp.int32), jnp.ones((4, W)))
  new = jax.jit(row_updates.apply_updates)(TABLE, update)
  np.testing.assert_array_equal(new, TABLE)
