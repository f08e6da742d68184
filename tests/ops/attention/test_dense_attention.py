# SPDX-License-Identifier: Apache-2.0
"""Dense attention against its definition, on one table of shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.ops.attention.dense import (
  attention,
  attention_reference,
  document_mask,
)

# B, T, S, N, K, H
SHAPES = [
  (1, 1, 1, 1, 1, 2),
  (2, 7, 7, 4, 4, 8),
  (2, 7, 7, 4, 2, 8),
  (3, 5, 5, 6, 1, 4),
  (2, 1, 9, 4, 2, 8),
]


def make_inputs(shape, dtype=jnp.float32):
  """Documents of random lengths, some padding, queries at the end of keys."""
  b, t, s, n, k, h = shape
  rng = np.random.default_rng(0)
  heads = [(b, t, n, h), (b, s, k, h), (b, s, k, h)]
  arrays = [rng.normal(size=size).astype(dtype) for size in heads]
  segments = np.sort(rng.integers(0, 3, (b, s)), axis=1)
  segments[:, -1] = 2
  positions = np.stack(
    [np.arange(s) - np.searchsorted(row, row) for row in segments]
  )
  positions, segments = positions.astype(np.int32), segments.astype(np.int32)
  ids = (positions[:, -t:], positions, segments[:, -t:], segments)
  return arrays, ids


def value_and_gradients(function, arrays, ids):
  """One compilation for both: compiling is what takes time here."""

  def loss(*arrays):
    y = function(*arrays, *map(jnp.asarray, ids))
    return jnp.sin(y).sum(), y

  grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  gradients, y = grad(*arrays)
  return y, *gradients


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_equals_the_reference(shape):
  fast, slow = (
    value_and_gradients(function, *make_inputs(shape))
    for function in (attention, attention_reference)
  )
  for got, want in zip(fast, slow, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('shape', [SHAPES[0], SHAPES[4]], ids=str)
def test_equals_the_reference_in_bfloat16(shape):
  arrays, ids = make_inputs(shape, jnp.bfloat16)
  fast = jax.jit(attention)(*arrays, *ids)
  slow = jax.jit(attention_reference)(*arrays, *ids)
  assert fast.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(fast), np.float32(slow), atol=2e-2)


@pytest.mark.parametrize(
  ('sizes', 'num_kv_heads'), [((8, 1, 1), 1), ((2, 1, 4), 4), ((2, 2, 2), 2)]
)
def test_any_mesh_gives_the_same(sizes, num_kv_heads):
  arrays, ids = make_inputs((8, 6, 6, 8, num_kv_heads, 4))

  expected = value_and_gradients(attention, arrays, ids)
  with jax.set_mesh(mesh.make_mesh(*sizes)):
    arrays = [jax.device_put(x, mesh.act('BTNH')) for x in arrays]
    ids = [jax.device_put(x, mesh.act('BT')) for x in ids]
    sharded = value_and_gradients(attention, arrays, ids)
    assert jax.typeof(sharded[0]).sharding.spec == mesh.act('BTNH')
  for got, want in zip(sharded, expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_padding_gives_zero_and_finite_gradients():
  arrays, ids = make_inputs((2, 4, 4, 2, 2, 4))
  nothing = np.zeros((2, 4), np.int32)
  ids = (ids[0], ids[1], nothing, nothing)

  y, *gradients = value_and_gradients(attention, arrays, ids)
  np.testing.assert_array_equal(y, 0.0)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_mask_by_hand():
  positions = np.array([[0, 0, 1, 0]], np.int32)
  segments = np.array([[0, 1, 1, 2]], np.int32)
  expected = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
  mask = jax.jit(document_mask)(positions, positions, segments, segments)
  np.testing.assert_array_equal(mask, np.array([expected], bool))


@pytest.mark.parametrize('window', [1, 3])
def test_a_window_is_what_jax_calls_one_less(window):
  """`jax.nn` counts the positions beside one's own."""
  arrays, _ = make_inputs((2, 7, 7, 4, 2, 8))

  @jax.jit
  def both(*arrays):
    rows, ones = jnp.tile(jnp.arange(7), (2, 1)), jnp.ones((2, 7), jnp.int32)
    got = attention(*arrays, rows, rows, ones, ones, window=window)
    want = jax.nn.dot_product_attention(
      *arrays, is_causal=True, local_window_size=(window - 1, 0)
    )
    return got, want

  got, want = both(*arrays)
  np.testing.assert_allclose(got, want, atol=1e-6)
