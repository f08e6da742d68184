# SPDX-License-Identifier: Apache-2.0
"""What a memory layer runs on GPUs only, beside what it runs elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.nn.memory import key_scores
from jaxsparse.ops.memory import tucker, value_bag
from jaxsparse.ops.top_k import top_m

T, P, Q, WIDTH, RANKS = 7, 2, 5, 4, 3


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('num_queries', [1, RANKS])
def test_one_product_scores_all_ranks(num_queries):
  query = draw(T, 2, num_queries, WIDTH)
  keys = draw(P, 2, Q, WIDTH, RANKS, seed=1)
  every = np.broadcast_to(query, (T, 2, RANKS, WIDTH))
  sides = jax.jit(key_scores.by_one_product)(query, keys)
  for s, scores in enumerate(sides):
    expected = np.einsum('trk,pqkr->tpqr', every[:, s], keys[:, s])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_narrow_keys_meet_the_whole_query(dtype):
  """A query rounded to bfloat16 would be off by 2^-9, a hundred times more."""
  query, keys = draw(T, 2, RANKS, 64), draw(P, 2, Q, 64, RANKS, seed=1)
  keys = keys.astype(dtype)
  wide = np.asarray(keys.astype(jnp.float32))
  for s, scores in enumerate(jax.jit(key_scores.by_one_product)(query, keys)):
    expected = np.einsum('trk,pqkr->tpqr', query[:, s], wide[:, s])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, atol=2e-5 * scale)


@pytest.mark.parametrize('num_quadrants', [1, 2])
def test_candidates_of_both_axes_at_once(num_quadrants):
  axes = draw(T, P, 16), draw(T, P, 16, seed=1)

  @jax.jit
  def both(axes):
    together = tucker._candidates_together(axes, top_m, 4, num_quadrants)
    return together, [
      tucker._candidates(x, top_m, 4, num_quadrants) for x in axes
    ]

  for found, apart in zip(*both(axes), strict=True):
    np.testing.assert_array_equal(found, apart)


@pytest.mark.parametrize(('num_pools', 'num_cores'), [(1, 1), (4, 2)])
def test_few_tokens_are_pooled_by_a_matmul(num_pools, num_cores):
  rng = np.random.default_rng(0)
  slot, pool = (
    rng.integers(n, size=(T, 6), dtype=np.int32) for n in (20, num_pools)
  )
  pool = pool if num_pools > 1 else None
  args = draw(20, 8), slot, draw(T, 6, num_cores, seed=1), pool

  @jax.jit
  def both(*args):
    return (
      value_bag._forward_gathered(*args, num_pools),
      value_bag.value_bag_reference(*args, num_pools),
    )

  np.testing.assert_allclose(*both(*args), atol=1e-5)
