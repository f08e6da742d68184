# SPDX-License-Identifier: Apache-2.0
"""The indexer: its scores, what it learns from, and what learns from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.ops.sparse_attention.block_router import (
  Router,
  router_loss,
  router_scores,
)
from jaxsparse.ops.sparse_attention.block_selection import Selection
from jaxsparse.ops.sparse_attention.block_summaries import summarize
from jaxsparse.ops.sparse_attention.sparse_attention import sparse_attention
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)
from jaxsparse.ops.sparse_attention.tile_attention import attend_tiles, to_pages

B, N, K, H, J, I = 2, 4, 2, 8, 3, 5
OPTIONS = SparseOptions(
  block=4, tile=2, window_blocks=1, max_blocks=3, min_blocks=2
)
ALL = np.inf


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def draw(length, seed=0):
  """Queries, keys, values, and a router of as many rows."""
  rng = np.random.default_rng(seed)
  heads = [rng.normal(size=(B, length, n, H)) for n in (N, K, K)]
  shapes = ((J, I), (J,), (I,))
  router = [rng.normal(size=(B, length, *shape)) for shape in shapes]
  return heads, Router(*router)


@functools.partial(jax.jit, static_argnames='options')
def run(heads, router, coverage=0.6, options=OPTIONS):
  query, key, value = heads
  segments = jnp.ones(query.shape[:2], jnp.int32)
  coverage = jnp.full((*query.shape[:2], K), coverage)
  inputs = SparseInputs(query, key, value, segments, coverage, router=router)
  return sparse_attention(inputs, options)


def test_scores_are_sums_over_heads():
  _, router = draw(6)
  expected = np.zeros((B, 6, 6))
  for b, t, s, j in np.ndindex(B, 6, 6, J):
    product = router.query[b, t, j] @ router.key[b, s]
    expected[b, t, s] += router.weight[b, t, j] * max(product, 0)
  np.testing.assert_allclose(
    jax.jit(router_scores)(router), expected / np.sqrt(J * I), rtol=1e-12
  )


def test_loss_is_the_divergence_over_kept_blocks():
  rng = np.random.default_rng(0)
  shares = rng.dirichlet(np.ones(6), size=(1, 1, 3))
  block = np.array([[4, 1, 5], [0, 3, 2], [1, 2, 3]])[None, None]
  masses = np.array([[0.7, 0.3, 0], [0, 0, 0], [0.2, 0.3, 0.5]])[None, None]

  @jax.jit
  def with_slope(shares, masses):
    chosen = jnp.asarray(block)
    loss, pull_back = jax.vjp(lambda x: router_loss(x, chosen, masses), shares)
    return loss, pull_back(jnp.ones_like(loss))[0]

  expected = []
  for share, slots, mass in zip(
    shares[0, 0], block[0, 0], masses[0, 0], strict=True
  ):
    of_slots = np.where(mass > 0, share[slots], 0)
    of_slots = of_slots / max(of_slots.sum(), 1e-300)
    expected.append(
      sum(
        p * np.log(p / s) for p, s in zip(mass, of_slots, strict=True) if p > 0
      )
    )
  found, slope = map(np.asarray, with_slope(shares, masses))
  np.testing.assert_allclose(found[0, 0], expected, rtol=1e-12)
  same = np.take_along_axis(shares, block, axis=-1)
  same /= same.sum(-1, keepdims=True)
  assert np.abs(with_slope(shares, same)[0]).max() < 1e-15
  assert np.isfinite(slope).all()
  assert (slope[0, 0, 1] == 0).all()


def test_masses_are_those_of_dense_attention():
  """Aggregated over rows and heads, of all blocks before the window."""
  (query, key, value), _ = draw(24)
  first_row, kept = 16, 3
  rows = slice(first_row, first_row + OPTIONS.tile)

  @jax.jit
  def masses_of(query, key, value):
    segments = jnp.ones((B, 24), jnp.int32)
    pages = to_pages(key, value, segments, OPTIONS.block)
    shape = (B, K, 1, kept)
    selection = Selection(
      jnp.broadcast_to(jnp.array([2, 0, 1]), shape),
      jnp.ones(shape),
      jnp.ones(shape, bool),
    )
    *_, masses = attend_tiles(
      query[:, rows].reshape(B, 1, OPTIONS.tile, K, N // K, H),
      jnp.ones((B, 1, OPTIONS.tile, K, N // K, 3)),
      jnp.array([first_row]),
      segments[:, rows].reshape(B, 1, OPTIONS.tile),
      pages,
      summarize(*pages),
      selection,
      OPTIONS,
    )
    return masses

  masses = np.asarray(masses_of(query, key, value))
  # All rows of blocks 0, 1 and 2 are before the window of block 4.
  for b, k in np.ndindex(B, K):
    expected = np.zeros(3)
    for t in range(rows.start, rows.stop):
      for n in range(k * N // K, (k + 1) * N // K):
        weight = np.exp(key[b, :12, k] @ query[b, t, n] / np.sqrt(H))
        expected += (weight / weight.sum()).reshape(3, 4).sum(1)
    expected /= expected.sum()
    np.testing.assert_allclose(masses[b, k, 0], expected[[2, 0, 1]], rtol=1e-12)


def test_the_router_chooses_and_nothing_else():
  heads, router = draw(32)
  # It wants block 2 most, and then block 0.
  wanted = np.zeros((B, 32, I))
  wanted[:, 8:12] = 3.0
  wanted[:, 0:4] = 1.0
  router = Router(*map(np.ones_like, router[:2]), wanted)
  _, stats = run(heads, router, coverage=0.0)
  # From row 20 on both are before the window, and two are kept.
  blocks = np.asarray(stats['block'])[:, :, 10:, :2]
  np.testing.assert_array_equal(
    blocks, np.broadcast_to([0, 2], blocks.shape), 'sinks come first'
  )
  others, _ = draw(32, seed=1)
  _, same = run(others, router, coverage=0.0)
  np.testing.assert_array_equal(same['block'], stats['block'])


def test_attention_and_router_learn_apart():
  heads, router = draw(24)

  def losses(heads, router):
    y, stats = run(heads, router)
    of_output = jnp.sin(y).sum() + stats['kept'].sum()
    return of_output, stats['router_loss'].sum()

  @jax.jit
  def slopes(heads, router):
    _, pull_back = jax.vjp(losses, heads, router)
    return pull_back((1.0, 0.0)), pull_back((0.0, 1.0))

  (of_heads, of_router), (loss_of_heads, loss_of_router) = (
    [max(np.abs(x).max() for x in jax.tree.leaves(tree)) for tree in trees]
    for trees in slopes(heads, router)
  )
  assert of_heads > 0
  assert of_router == 0
  assert loss_of_heads == 0
  assert loss_of_router > 0


def test_it_learns_what_attention_reads():
  heads, router = draw(32)
  # All blocks are kept, as in a warm-up.
  options = SparseOptions(block=4, tile=2, window_blocks=1, max_blocks=8)

  @jax.jit
  def step(router):
    loss, slope = jax.value_and_grad(
      lambda router: run(heads, router, ALL, options)[1]['router_loss'].mean()
    )(router)
    return loss, jax.tree.map(lambda x, g: x - 30.0 * g, router, slope)

  losses = []
  for _ in range(60):
    loss, router = step(router)
    losses.append(float(loss))
  assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize('length', few([22], [22, 31]))
@pytest.mark.parametrize('is_tied', [False, True])
def test_choice_does_not_depend_on_the_length(is_tied, length):
  """ReLU makes many scores exactly 0: ties go to the earlier block."""
  heads, router = draw(32)
  if is_tied:
    router = router._replace(weight=0 * router.weight)
  _, whole = run(heads, router)
  part = jax.tree.map(lambda x: x[:, :length], (heads, router))
  _, stats = run(*part)
  tiles = length // OPTIONS.tile
  for name in ('block', 'is_kept'):
    slots = min(stats[name].shape[-1], whole[name].shape[-1])
    is_kept = np.asarray(whole['is_kept'])[:, :, :tiles, :slots]
    found, expected = (
      np.asarray(x[name])[:, :, :tiles, :slots] for x in (stats, whole)
    )
    np.testing.assert_array_equal(
      np.where(is_kept, found, -1), np.where(is_kept, expected, -1)
    )
