# SPDX-License-Identifier: Apache-2.0
"""Decoding from kept blocks is what a paged kernel does with a short table."""

import functools

import jax
import numpy as np
import pytest

from jaxsparse.ops.sparse_attention.sparse_cache import (
  cached_sparse_attention,
  init_sparse_cache,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)

# Deprecated by JAX 0.12.
paged_attention = pytest.importorskip(
  'jax.experimental.pallas.ops.gpu.paged_attention'
)

B, N, K, H = 2, 4, 2, 16
OPTIONS = SparseOptions(
  block=8, tile=1, window_blocks=1, max_blocks=3, use_summaries=False
)


run = jax.jit(functools.partial(cached_sparse_attention, options=OPTIONS))
init = jax.jit(lambda: init_sparse_cache(B, K, 64, H, OPTIONS))


@jax.jit
def from_pages(query, cache, tables, num_rows):
  """By a paged kernel; a page for each block and head, in one pool."""
  pages = cache.pages(OPTIONS.block)
  pool_shape = (1, -1, OPTIONS.block, H)
  paged = paged_attention.paged_attention(
    (query * H**-0.5).reshape(B * K, N // K, H),
    pages.key.reshape(pool_shape),
    pages.value.reshape(pool_shape),
    tables.reshape(B * K, -1),
    num_rows.reshape(-1),
    pages_per_compute_block=1,
    k_splits=1,
    interpret=True,
  )
  return paged.reshape(query.shape)


# The last row of a block, the first of one, and one between.
@pytest.mark.parametrize('last', [47, 48, 59])
def test_kept_blocks_are_a_page_table(last):
  rng = np.random.default_rng(0)
  query = rng.normal(size=(B, last + 1, N, H))
  key, value = rng.normal(size=(2, B, last + 1, K, H))
  # Of the two heads one keeps fewer blocks.
  coverage = np.broadcast_to([0.1, 0.95], (B, last + 1, K))
  inputs = [x.astype(np.float32) for x in (query, key, value, coverage)]
  segments = np.ones((B, last + 1), np.int32)
  cache = init()
  # A prompt, and single tokens after it.
  for begin, end in [(0, 44), *((i, i + 1) for i in range(44, last + 1))]:
    query, key, value, coverage = (x[:, begin:end] for x in inputs)
    arrays = SparseInputs(query, key, value, segments[:, begin:end], coverage)
    y, cache, stats = run(arrays, cache, np.int32(begin))
  num_kept = np.asarray(stats['kept'])[..., 0].astype(int)
  assert num_kept.min() < num_kept.max()

  num_blocks, own = 64 // OPTIONS.block, last // OPTIONS.block
  tables = np.zeros(
    (B, K, OPTIONS.max_blocks + OPTIONS.window_blocks + 1), np.int32
  )
  for b, k in np.ndindex(B, K):
    is_kept = np.asarray(cache.is_kept)[b, k]
    blocks = [*np.asarray(cache.kept_block)[b, k][is_kept]]
    # The open page comes last: kernels mask by the length.
    blocks += range(own - OPTIONS.window_blocks, own + 1)
    tables[b, k, : len(blocks)] = blocks
    tables[b, k] += (b * K + k) * num_blocks
  num_rows = (num_kept + OPTIONS.window_blocks) * OPTIONS.block
  num_rows += last % OPTIONS.block + 1
  paged = from_pages(query, cache, tables, num_rows.astype(np.int32))
  np.testing.assert_allclose(paged, y, rtol=0, atol=5e-7)
