# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.memory.gathered_dot import (
  gathered_dot,
  gathered_dot_reference,
)

T, k, M, W = 7, 9, 23, 12


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  table = rng.normal(size=(M, W)).astype(dtype)
  slot = rng.integers(M, size=(T, k)).astype(np.int32)
  vector = rng.normal(size=(T, W)).astype(np.float32)
  # Unlike `jnp.asarray`, without a program for each shape.
  return jax.device_put((table, slot, vector))


def run(function, table, slot, vector):
  def loss(table, vector):
    products = function(table, slot, vector)
    factor = jnp.cos(jnp.arange(products.size)).reshape(products.shape)
    return (products * factor).sum(), products

  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(table, vector)


@pytest.mark.parametrize('way', ['scatter', 'deterministic'])
def test_equals_reference(way):
  def products(*args):
    return gathered_dot(*args, table_gradient=way)

  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5),
    run(products, *inputs()),
    run(gathered_dot_reference, *inputs()),
  )


def test_entries_not_in_use_give_and_get_nothing():
  table, slot, vector = inputs()
  num_valid = np.arange(T, dtype=np.int32)
  in_use = np.arange(k)[None] < num_valid[:, None]

  def masked(*args):
    return jnp.where(in_use, gathered_dot_reference(*args), 0)

  def used(table, slot, vector):
    slot = jnp.where(in_use, slot, M + 5)
    return gathered_dot(table, slot, vector, num_valid=jnp.asarray(num_valid))

  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5),
    run(used, table, slot, vector),
    run(masked, table, slot, vector),
  )


def test_narrow_tables_give_wide_products():
  products = jax.eval_shape(gathered_dot, *inputs(jnp.bfloat16))
  assert products.dtype == jnp.float32
