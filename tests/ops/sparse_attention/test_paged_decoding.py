"""Decoding from kept blocks is what a paged kernel does with a short table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.sparse_attention.block_selection import Grid
from jaxsparse.ops.sparse_attention.sparse_cache import (
  cached_sparse_attention,
  init_sparse_cache,
)

# Deprecated by JAX 0.12.
paged_attention = pytest.importorskip(
  'jax.experimental.pallas.ops.gpu.paged_attention'
)

B, N, K, H = 2, 4, 2, 16
GRID = Grid(block=8, tile=1, window_blocks=1, slots=3)


run = jax.jit(
  functools.partial(cached_sparse_attention, grid=GRID, use_summaries=False)
)


# The last row of a block, the first of one, and one between.
@pytest.mark.parametrize('last', [47, 48, 59])
def test_kept_blocks_are_a_page_table(last):
  """Of a page for each block and key/value head, in one pool."""
  rng = np.random.default_rng(0)
  query = rng.normal(size=(B, last + 1, N, H))
  key, value = rng.normal(size=(2, B, last + 1, K, H))
  # Of the two heads one keeps fewer blocks.
  coverage = np.broadcast_to([0.1, 0.95], (B, last + 1, K))
  inputs = [jnp.asarray(x, jnp.float32) for x in (query, key, value, coverage)]
  segments = jnp.ones((B, last + 1), jnp.int32)
  gates = jnp.ones((B, last + 1, N, 3))
  cache = init_sparse_cache(B, K, 64, H, GRID)
  # A prompt, and single tokens after it.
  for begin, end in [(0, 44), *((i, i + 1) for i in range(44, last + 1))]:
    query, key, value, coverage = (x[:, begin:end] for x in inputs)
    y, cache, stats = run(
      query, key, value, segments[:, begin:end], coverage, gates[:, begin:end],
      cache, jnp.int32(begin),
    )  # fmt: skip
  num_kept = np.asarray(stats['kept'][..., 0], int)
  assert num_kept.min() < num_kept.max()

  pages = cache.pages(GRID.block)
  num_blocks, own = pages.key.shape[2], last // GRID.block
  tables = np.zeros((B, K, GRID.slots + GRID.window_blocks + 1), np.int32)
  for b, k in np.ndindex(B, K):
    is_kept = np.asarray(cache.is_kept[b, k])
    blocks = [*np.asarray(cache.kept_block[b, k])[is_kept]]
    # The open page comes last: kernels mask by the length.
    blocks += range(own - GRID.window_blocks, own + 1)
    tables[b, k, : len(blocks)] = blocks
    tables[b, k] += (b * K + k) * num_blocks
  num_rows = (num_kept + GRID.window_blocks) * GRID.block
  num_rows += last % GRID.block + 1
  pool_shape = (1, B * K * num_blocks, GRID.block, H)
  paged = paged_attention.paged_attention(
    (query * H**-0.5).reshape(B * K, N // K, H),
    pages.key.reshape(pool_shape),
    pages.value.reshape(pool_shape),
    jnp.asarray(tables.reshape(B * K, -1)),
    jnp.asarray(num_rows.reshape(-1), jnp.int32),
    pages_per_compute_block=1,
    k_splits=1,
    interpret=True,
  )
  np.testing.assert_allclose(paged.reshape(y.shape), y, rtol=0, atol=5e-7)
