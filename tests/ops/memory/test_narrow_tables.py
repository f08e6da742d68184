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
from lanes import few

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


def normal(*shape, dtype=np.float32):
  # Unlike `jnp.asarray`, without a program for each shape.
  return jax.device_put(RNG.normal(size=shape).astype(dtype))


def integers(high, *shape):
  return jax.device_put(RNG.integers(high, size=shape).astype(np.int32))


TABLE = normal(M, W, dtype=jnp.bfloat16)
SLOT = integers(M, T, k)
POOL = integers(4, T, k)
NUM_VALID = integers(k, T)
WEIGHT = normal(T, k, 2)
VECTOR = normal(T, W)
SIZES = jax.device_put(np.full(X, T // X, np.int32))
EXPERT = integers(X, 4)


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


ROWS = normal(T, M // X)
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
    normal(4, M // X),
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


# Gradients are of programs that also read the table as the bags alone do.
@pytest.mark.parametrize(
  'name', few(CASES.keys() - {'pools', 'in use', 'products'}, CASES)
)
def test_programs_hold_no_other_copy(name):
  function, x = CASES[name]
  actual = compile_without_copy(function, TABLE, x)(TABLE, x)
  expected = jax.jit(function)(np.asarray(TABLE).astype(np.float32), x)
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
      jax.device_put(np.asarray(x).reshape(2, -1, *x.shape[1:]), tokens)
      for x in (SLOT, WEIGHT, VECTOR)
    )
    vector = jax.device_put(vector, jax.P(mesh_lib.TOKENS, None, 'model'))
    table = jax.device_put(TABLE, mesh_lib.table(scheme))
    program = jax.jit(jax.grad(loss, (0, 1))).lower(weight, vector, table)
    memory = program.compile().memory_analysis()
  assert memory.temp_size_in_bytes < TABLE.nbytes / 2


@pytest.mark.parametrize('has_key', [False, True])
def test_rows_change_in_place(has_key):
  """By a step that first reads them, with and without stochastic rounding."""
  rows = np.sort(RNG.choice(M, 50, replace=False)).astype(np.int32)
  slot = np.append(rows, np.arange(M, M + 6, dtype=np.int32))
  value = normal(56, W)
  key = jax.random.key(0) if has_key else None

  def step(table, slot, value, key):
    return row_updates.apply_updates(table, RowGradient(slot, value), key)

  table = np.asarray(TABLE)
  expected = table.astype(np.float32)
  expected[rows] += np.asarray(value)[:50]
  args = (slot, value, key)
  program = compile_without_copy(step, TABLE, *args, donate_argnums=0)
  actual = program(jax.device_put(table), *args)
  actual = np.asarray(actual).astype(np.float32)
  untouched = np.delete(np.arange(M), rows)
  np.testing.assert_array_equal(actual[untouched], expected[untouched])
  resolution = 2.0**-8 if not has_key else 2.0**-7
  np.testing.assert_allclose(actual, expected, rtol=resolution)
  assert (actual[rows] != table[rows].astype(np.float32)).mean() > 0.9


def test_a_step_on_no_row_changes_nothing():
  rows = M + np.arange(4, dtype=np.int32)
  update = RowGradient(*jax.device_put((rows, np.ones((4, W), np.float32))))
  new = jax.jit(row_updates.apply_updates)(TABLE, update)
  np.testing.assert_array_equal(new, TABLE)
