# SPDX-License-Identifier: Apache-2.0
"""A bag of a quantized table is that of its numbers, which are never made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh as mesh_lib
from jaxsparse.ops import chunking
from jaxsparse.ops.memory import value_bag as bag
from jaxsparse.ops.memory import value_bag_gradient as gradient
from jaxsparse.ops.memory.gathered_dot import (
  gathered_dot,
  gathered_dot_reference,
)
from jaxsparse.ops.memory.sharded_bag import (
  sharded_gathered_dot,
  sharded_value_bag,
)
from jaxsparse.ops.memory.value_bag import value_bag, value_bag_reference
from jaxsparse.ops.tables.quantized_table import QuantizedTable, encoded
from jaxsparse.ops.tables.row_format import KINDS, row_bytes

M, W, T, k = 40, 48, 6, 19
RNG = np.random.default_rng(0)


def normal(*shape):
  # Unlike `jnp.asarray`, without a program for each shape.
  return jax.device_put(RNG.normal(size=shape).astype(np.float32))


TABLE = normal(M, W)
SLOT = jax.device_put(RNG.integers(M, size=(T, k)).astype(np.int32))
WEIGHT = normal(T, k, 4)
POOL = jax.device_put(RNG.integers(4, size=(T, k)).astype(np.int32))
NUM_VALID = jax.device_put(np.array([0, k, 3, 1, 0, 8], np.int32))
VECTOR = normal(T, W)


@functools.cache
def table_of(kind, parts=1):
  return encoded(TABLE, kind, parts)


# By one program, and not by one of each operation.
reference_bag = jax.jit(value_bag_reference, static_argnums=4)


def equal(actual, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * scale)


# Entries of the bag in use and pools: what decides on a CPU's form.
CASES = [
  (kind, parts, c, E, has_num_valid)
  for kind, parts in [('int8', 1), ('int4', 1), ('int4', 3), ('float8', 2)]
  for c in (1, 2, 3, 4)
  for E in (1, 4)
  for has_num_valid in (False, True)
]


@pytest.mark.parametrize(
  ('kind', 'parts', 'c', 'E', 'has_num_valid'),
  few(
    [
      ('int8', 1, 1, 1, False),
      ('int4', 1, 2, 1, False),
      ('int4', 1, 4, 4, True),
      ('int4', 3, 4, 1, True),
    ],
    CASES,
  ),
)
def test_bag_equals_that_of_the_numbers(kind, parts, c, E, has_num_valid):
  table, weight = table_of(kind, parts), WEIGHT[..., :c]
  args = SLOT, weight, POOL if E > 1 else None, E
  num_valid = NUM_VALID if has_num_valid else None
  equal(
    jax.jit(value_bag, static_argnums=4)(table, *args, num_valid=num_valid),
    reference_bag(table.dequantized(), *args, num_valid=num_valid),
  )


def gathered(table, slot, weight, pool):
  return bag._forward_gathered(table, slot, weight, pool, 4)


def fused(table, slot, weight, pool):
  return bag._forward_fused(table, slot, weight, pool, 4)


def unrolled(table, slot, weight, pool):
  return bag._forward_unrolled(table, slot, weight, pool, NUM_VALID, 4, 5)


def chunked(table, slot, weight, pool):
  return bag._forward_chunked(table, slot, weight, pool, None, 4, 2**12)


FORMS = (gathered, fused, unrolled, chunked)


@pytest.mark.parametrize(
  ('form', 'kind'),
  few(
    [(fused, 'int4'), (unrolled, 'int8')],
    [(form, kind) for form in FORMS for kind in KINDS],
  ),
)
def test_every_form_equals_that_of_the_numbers(form, kind, monkeypatch):
  # Two tokens in one kernel.
  monkeypatch.setattr(bag, '_FUSED_READS', 2 * k * 4 * W)
  table, args = table_of(kind), (SLOT, WEIGHT[..., :2], POOL)
  num_valid = NUM_VALID if form is unrolled else None
  in_use = jnp.arange(k)[None] < NUM_VALID[:, None]
  if num_valid is not None:
    args = (SLOT, jnp.where(in_use[..., None], args[1], 0), POOL)
  equal(
    jax.jit(form)(table, *args), value_bag_reference(
      table.dequantized(), *args, 4
    ),
  )  # fmt: skip


@pytest.mark.parametrize('kind', few(['int4'], KINDS))
def test_products_equal_those_of_the_numbers(kind):
  table = table_of(kind)
  expected = gathered_dot_reference(table.dequantized(), SLOT, VECTOR)
  equal(jax.jit(gathered_dot)(table, SLOT, VECTOR), expected)
  form = jax.jit(gradient._weight_gradient_whole)
  weight = np.zeros((T, k, 1), np.float32)
  args = table, SLOT, weight, None, None, VECTOR[:, None]
  equal(form(*args)[..., 0], expected)


@pytest.mark.parametrize('kind', KINDS)
def test_scales_apart_make_the_same_numbers(kind):
  table = table_of(kind, 3)
  apart = table.with_scales_apart()
  assert apart.stored.shape == (M, W // 2 if kind == 'int4' else W)
  assert apart.scale.shape == (M, 3)
  assert apart.shape == table.shape
  np.testing.assert_array_equal(apart.dequantized(), table.dequantized())
  inside = apart.with_scales_inside()
  np.testing.assert_array_equal(inside.stored, table.stored)
  bag = jax.jit(value_bag)
  equal(bag(apart, SLOT, WEIGHT), bag(table, SLOT, WEIGHT))


def test_no_tokens_and_no_entries():
  table = table_of('int8')
  assert value_bag(table, SLOT[:0], WEIGHT[:0]).shape == (0, 1, W)
  assert not value_bag(table, SLOT[:, :0], WEIGHT[:, :0]).any()


def test_weights_and_vectors_get_gradients_and_the_table_none():
  table = table_of('int4')

  def loss(table, weight, vector):
    products = gathered_dot(table, SLOT, vector)
    pooled = value_bag(table, SLOT, weight * products[..., None])
    return jnp.square(pooled).sum()

  grad = jax.grad(loss, (0, 1, 2), allow_int=True)
  of_table, *others = jax.jit(grad)(table, WEIGHT[..., :1], VECTOR)
  assert isinstance(of_table, QuantizedTable)
  assert of_table.stored.dtype == jax.dtypes.float0
  _, *expected = jax.jit(grad)(table.dequantized(), WEIGHT[..., :1], VECTOR)
  for actual, of_numbers in zip(others, expected, strict=True):
    equal(actual, of_numbers)


@pytest.mark.parametrize('kind', KINDS)
def test_a_pool_errs_as_its_table_does(kind):
  values, weight = normal(512, 256), normal(256, 32, 1)
  table = encoded(values, kind)
  slot = jax.device_put(RNG.integers(512, size=(256, 32)).astype(np.int32))

  def error(actual, expected):
    difference = np.asarray(actual) - np.asarray(expected)
    return np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected))

  assert error(
    value_bag(table, slot, weight), value_bag(values, slot, weight)
  ) == pytest.approx(error(table.dequantized(), values), rel=0.05)


@pytest.mark.parametrize(
  ('kind', 'num_pools'),
  few(
    [('int8', 1), ('int4', 4)], [(kind, E) for kind in KINDS for E in (1, 4)]
  ),
)
def test_no_program_holds_the_table_in_numbers(kind, num_pools):
  rows, width = 2**16, 128
  stored = jax.ShapeDtypeStruct((rows, row_bytes(width, kind)), np.uint8)
  table = QuantizedTable(stored, width, kind)
  slot = jax.ShapeDtypeStruct((64, 24), np.int32)
  weight = jax.ShapeDtypeStruct((64, 24, 2), np.float32)
  vector = jax.ShapeDtypeStruct((64, width), np.float32)

  def forward(table, slot, weight, vector):
    products = gathered_dot(table, slot, vector)
    pool = slot % num_pools if num_pools > 1 else None
    return value_bag(table, slot, weight * products[..., None], pool, num_pools)

  compiled = jax.jit(forward).lower(table, slot, weight, vector).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < rows * width * 4 / 10
  assert memory.argument_size_in_bytes < 1.2 * table.nbytes
  # No more for a larger table.
  stored = jax.ShapeDtypeStruct((2 * rows, row_bytes(width, kind)), np.uint8)
  larger = QuantizedTable(stored, width, kind)
  compiled = jax.jit(forward).lower(larger, slot, weight, vector).compile()
  more = compiled.memory_analysis().temp_size_in_bytes
  assert more == memory.temp_size_in_bytes


SCHEMES = [
  ('columns', (1, 8, 1)),
  ('columns', (2, 2, 2)),
  ('rows', (1, 8, 1)),
  ('rows', (2, 2, 2)),
  ('grid', (2, 2, 2)),
  ('grid', (8, 1, 1)),
]


@pytest.mark.parametrize(
  ('scheme', 'sizes', 'kind'),
  few(
    [
      ('columns', (2, 2, 2), 'int4'),
      ('grid', (2, 2, 2), 'int8'),
    ],
    [(*case, kind) for case in SCHEMES for kind in ('int8', 'int4')],
  ),
)
def test_every_scheme_on_eight_devices_equals_one(scheme, sizes, kind):
  """With a scale for each part of the columns, in as many as pieces or more."""
  slot, weight = SLOT[:, :8].T.reshape(8, 3, 2), WEIGHT[:, :8].swapaxes(0, 1)
  weight = weight.reshape(8, 3, 2, 4)[..., :2]
  vector = normal(8, 3, W)
  table = table_of(kind, 8)

  def layer(bag, dot, table, slot, weight, vector):
    weight *= dot(table, slot, vector)[..., None]
    return bag(table, slot, weight)

  expected = layer(
    lambda table, slot, weight: value_bag_reference(
      table, slot.reshape(24, 2), weight.reshape(24, 2, 2)
    ),
    lambda table, slot, vector: gathered_dot_reference(
      table, slot.reshape(24, 2), vector.reshape(24, W)
    ).reshape(slot.shape),
    table.dequantized(), slot, weight, vector,
  )  # fmt: skip
  sharded = functools.partial(
    layer,
    functools.partial(sharded_value_bag, scheme=scheme),
    functools.partial(sharded_gathered_dot, scheme=scheme),
  )
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):
    tokens = jax.P(mesh_lib.TOKENS)
    vectors = jax.P(mesh_lib.TOKENS, None, 'model')
    args = (
      jax.device_put(x, spec)
      for x, spec in zip(
        (table, slot, weight, vector),
        (mesh_lib.table(scheme), tokens, tokens, vectors),
        strict=True,
      )
    )
    actual = jax.jit(sharded)(*args)
  equal(actual.reshape(24, 1, W), expected)


def test_rows_of_a_quantized_table_are_numbers():
  table = table_of('int4', 3)
  np.testing.assert_array_equal(
    chunking.rows(table, SLOT), np.asarray(table.dequantized())[SLOT]
  )
  assert chunking.row_nbytes(table) == 4 * W
  assert (table.shape, len(table), table.dtype) == ((M, W), M, jnp.float32)
