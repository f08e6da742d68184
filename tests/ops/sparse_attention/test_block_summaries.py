# SPDX-License-Identifier: Apache-2.0
"""Keys and values that stand for blocks, beside sums over single rows."""

import jax
import numpy as np
import pytest

from jaxsparse.ops.sparse_attention.block_summaries import summarize

B, K, Z, BLOCK, H = 2, 2, 3, 4, 8
# Padding, a document that begins within a block, and one that ends in one.
SEGMENTS = np.array([[0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [1] * 10 + [0, 0]])


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def on_grid(x):
  return x.reshape(*x.shape[:2], Z, BLOCK, x.shape[-1])


def own_rows():
  """Shares of a block's rows that are of its last document."""
  shares = np.zeros((B, Z, BLOCK))
  for b, z in np.ndindex(B, Z):
    own = SEGMENTS[b, z * BLOCK : (z + 1) * BLOCK]
    rows = [s for s in range(BLOCK) if own[s] == own[-1] > 0]
    shares[b, z, rows] = 1 / max(len(rows), 1)
  return shares


def test_means_are_of_the_last_document():
  key, value = draw(B, K, Z * BLOCK, H), draw(B, K, Z * BLOCK, H, seed=1)
  segments = SEGMENTS.reshape(B, Z, BLOCK)
  found = jax.jit(summarize)(on_grid(key), on_grid(value), segments)
  for got, x in ((found.key, key), (found.value, value)):
    expected = np.einsum('bzs,bkzsh->bkzh', own_rows(), on_grid(x))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)
  np.testing.assert_array_equal(found.count, [[3, 2, 4], [4, 4, 0]])
  np.testing.assert_array_equal(found.segment, [[1, 2, 2], [1, 1, 0]])
