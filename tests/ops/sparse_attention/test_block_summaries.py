"""Keys and values that stand for blocks, beside sums over single rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.attention.rope import rotate
from jaxsparse.ops.sparse_attention.block_selection import Grid
from jaxsparse.ops.sparse_attention.block_summaries import (
  Pooling,
  plain_pooling,
  summarize,
)
from jaxsparse.ops.sparse_attention.sparse_attention import sparse_attention

B, K, Z, BLOCK, H = 2, 2, 3, 4, 8
# Padding, a document that begins within a block, and one that ends in one.
SEGMENTS = np.array([[0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [1] * 10 + [0, 0]])


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def on_grid(x):
  return x.reshape(*x.shape[:2], Z, BLOCK, x.shape[-1])


def positions():
  """Of each row in its document."""
  first = [np.argmax(row == s) for row in SEGMENTS for s in row]
  return np.arange(Z * BLOCK) - np.array(first).reshape(B, -1)


def weighted_rows(logit):
  """Sums over the rows of each block's last document, by their softmax."""
  weights = np.zeros((B, K, Z, BLOCK))
  for b, k, z in np.ndindex(B, K, Z):
    own = SEGMENTS[b, z * BLOCK : (z + 1) * BLOCK]
    rows = [s for s in range(BLOCK) if own[s] == own[-1] > 0]
    total = sum(np.exp(logit[b, k, z, s]) for s in rows)
    for s in rows:
      weights[b, k, z, s] = np.exp(logit[b, k, z, s]) / total
  return weights


def run(key, value, **how):
  segments = jnp.asarray(SEGMENTS).reshape(B, Z, BLOCK)
  return summarize(on_grid(key), on_grid(value), segments, **how)


def test_means_are_of_the_last_document():
  key, value = draw(B, K, Z * BLOCK, H), draw(B, K, Z * BLOCK, H, seed=1)
  weights = weighted_rows(np.zeros((B, K, Z, BLOCK)))
  for how in ({}, dict(pooling=plain_pooling(K))):
    found = run(key, value, **how)
    for got, x in ((found.key, key), (found.value, value)):
      expected = np.einsum('bkzs,bkzsh->bkzh', weights, on_grid(x))
      np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(found.count, [[3, 2, 4], [4, 4, 0]])
    np.testing.assert_array_equal(found.segment, [[1, 2, 2], [1, 1, 0]])


def test_keys_before_rotation_are_rotated_at_the_middle():
  key, value = draw(B, K, Z * BLOCK, H), draw(B, K, Z * BLOCK, H, seed=1)
  rotated = rotate(key, jnp.asarray(positions())[:, None])
  found = run(rotated, value, turn=rotate)
  weights = weighted_rows(np.zeros((B, K, Z, BLOCK)))
  mean = jnp.einsum('bkzs,bkzsh->bkzh', weights, on_grid(key))
  middle = np.einsum(
    'bzs,bzs->bz', weights[:, 0], positions().reshape(B, Z, BLOCK)
  )
  expected = rotate(mean, jnp.asarray(middle)[:, None])
  # Angles are of f32.
  np.testing.assert_allclose(found.key, expected, rtol=0, atol=2e-6)
  plain = run(rotated, value)
  np.testing.assert_array_equal(found.value, plain.value)
  assert np.abs(found.key - plain.key).max() > 0.1


def test_a_gate_weighs_rows_by_value_and_place():
  key, value = draw(B, K, Z * BLOCK, H), draw(B, K, Z * BLOCK, H, seed=1)
  pooling = Pooling(draw(K, H, seed=2), draw(K, BLOCK, seed=3))
  found = run(key, value, pooling=pooling)
  logit = np.zeros((B, K, Z, BLOCK))
  for b, k, z, s in np.ndindex(logit.shape):
    row = value[b, k, z * BLOCK + s]
    logit[b, k, z, s] = row @ pooling.weight[k] + pooling.bias[k, s]
  weights = weighted_rows(logit)
  for got, x in ((found.key, key), (found.value, value)):
    expected = np.einsum('bkzs,bkzsh->bkzh', weights, on_grid(x))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)
  even = run(key, value, pooling=jax.tree.map(jnp.zeros_like, pooling))
  for got, want in zip(even, run(key, value), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize('use_summaries', [True, False])
def test_a_gate_learns_by_the_summaries(use_summaries):
  """Choosing has no gradient to it, unless by what is covered."""
  grid = Grid(block=BLOCK, tile=BLOCK, window_blocks=0, slots=1)
  query, key, value = (draw(1, 5 * BLOCK, K, H, seed=i) for i in range(3))
  segments = jnp.ones((1, 5 * BLOCK), jnp.int32)
  coverage = jnp.full((1, 5 * BLOCK, K), 0.5)

  @functools.partial(jax.jit, static_argnames='grid')
  def slope(pooling, grid):
    def of_output(pooling):
      y, _ = sparse_attention(
        query, key, value, segments, segments, coverage,
        grid=grid, pooling=pooling, use_summaries=use_summaries,
      )  # fmt: skip
      return jnp.sin(y).sum()

    return jax.grad(of_output)(pooling)

  pooling = Pooling(draw(K, H, seed=4), draw(K, BLOCK, seed=5))
  # So sharp a step that the coverage has no gradient.
  sharp = dataclasses.replace(grid, temperature=1e-6)
  for x in jax.tree.leaves(slope(pooling, sharp)):
    assert (np.abs(x).max() > 1e-3) == use_summaries
