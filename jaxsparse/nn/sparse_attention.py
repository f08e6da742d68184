"""The part of a sparse attention between projections and output map.

See `ops.sparse_attention`. The parameters are gates of the three sets that a
query reads, and the share of importance that its kept blocks are to cover.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig, SparseAttentionConfig
from jaxsparse.nn.layers import Metrics
from jaxsparse.ops.block_selection import Grid
from jaxsparse.ops.sparse_attention import sparse_attention
from jaxsparse.ops.sparse_cache import (
  SparseCache,
  cached_sparse_attention,
  init_sparse_cache,
)

# Letters of a cache's arrays; Z and k are no letters of the mesh.
_CACHE_DIMS = SparseCache(
  key='BK..', value='BK..', segments='B.',
  summary_key='BK..', summary_value='BK..',
  summary_count='B.', summary_segment='B.',
  kept_block='BK.', is_kept='BK.',
)  # fmt: skip
# Of queries, keys, values, documents, coverage and gates.
_INPUT_DIMS = ('BTN.', 'BTK.', 'BTK.', 'BT', 'BTK', 'BTN.')
_STATS_DIMS = dict(kept='BK.', eligible='BK.', shares='BK..')
_SETS = ('window', 'kept', 'summary')


def make_grid(config: SparseAttentionConfig) -> Grid:
  return Grid(
    block=config.block,
    tile=config.tile,
    window_blocks=config.window_blocks,
    slots=config.max_blocks,
    sinks=config.sinks,
    least_fraction=config.min_fraction,
    most_fraction=config.max_fraction,
    temperature=config.temperature,
    is_overlapping=config.combine == 'gated',
  )


def init_rows(
  config: ModelConfig, batch_size: int, length: int
) -> dict[str, jax.Array]:
  """A sparse layer's part of a decoding cache."""
  cache = init_sparse_cache(
    batch_size,
    config.num_kv_heads,
    length,
    config.head_dim,
    make_grid(config.sparse),
    jnp.dtype(config.dtype),
  )
  return {
    name: mesh.reshard(x, mesh.act(dims))
    for (name, x), dims in zip(
      cache._asdict().items(), _CACHE_DIMS, strict=True
    )
  }


class SparseAttention(nn.Module):
  """Reads a window, the blocks that it chooses, and summaries of the others.

  Leaves: `gate` [D, N, 3], `coverage` [D, K] and `coverage_bias` [K]. At the
  start all sets count as they are and nearly all importance is covered.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B T K H'],
    value: Float[Array, 'B T K H'],
    segment_ids: Int[Array, 'B T'],
    cache: dict[str, jax.Array] | None = None,
  ) -> tuple[Float[Array, 'B T N H'], dict[str, jax.Array] | None, Metrics]:
    """Sums of the values, the extended cache, and metrics.

    The metrics are means over tiles with an eligible block: 'kept_share' of
    these blocks, 'coverage', and the shares of the softmax in 'window', 'kept'
    and 'summary'; 'aux_loss' is the price of the kept blocks.
    """
    sparse = self.config.sparse
    gates, coverage = self._gates_and_coverage(x)
    how = dict(
      grid=make_grid(sparse),
      use_summaries=sparse.use_summaries,
      combine=sparse.combine,
      chunk=sparse.query_chunk,
    )
    inputs = (query, key, value, segment_ids, coverage, gates)
    if cache is None:
      run = mesh.per_device(
        functools.partial(_all_at_once, how), _INPUT_DIMS, ('BTN.', _STATS_DIMS)
      )
      y, stats = run(*inputs)
    else:
      run = mesh.per_device(
        functools.partial(_from_cache, how),
        (*_INPUT_DIMS, _CACHE_DIMS, ''),
        ('BTN.', _CACHE_DIMS, _STATS_DIMS),
      )
      arrays = SparseCache(*(cache[name] for name in SparseCache._fields))
      y, arrays, stats = run(*inputs, arrays, cache['index'])
      cache = cache | arrays._asdict()
    return y, cache, self._metrics(stats, coverage)

  def _gates_and_coverage(self, x):
    config, model_dim = self.config, x.shape[-1]
    x = x.astype(jnp.float32)

    def zeros(name, dims, *shape):
      init = mesh.sharded(nn.initializers.zeros, mesh.param(dims))
      return mesh.gather(self.param(name, init, shape), dims)

    gate = zeros('gate', 'DN.', model_dim, config.num_heads, 3)
    matrix = zeros('coverage', 'DK', model_dim, config.num_kv_heads)
    init = nn.initializers.constant(config.sparse.coverage_logit)
    bias = self.param(
      'coverage_bias',
      mesh.sharded(init, mesh.param('K')),
      (config.num_kv_heads,),
    )
    gates = jax.nn.sigmoid(jnp.einsum('btd,dng->btng', x, gate))
    if config.sparse.combine == 'merged':
      gates *= 2
    logits = jnp.einsum('btd,dk->btk', x, matrix)
    coverage = jax.nn.sigmoid(logits + bias[None, None])
    return gates, coverage

  def _metrics(self, stats, coverage):
    eligible = stats['eligible'].astype(jnp.float32)
    counts = (eligible > 0).astype(jnp.float32)
    total = jnp.maximum(counts.sum(), 1.0)
    mean = functools.partial(_mean, counts, total)
    kept_share = mean(stats['kept'] / jnp.maximum(eligible, 1.0))
    metrics = dict(kept_share=kept_share, coverage=coverage.mean())
    for i, name in enumerate(_SETS):
      metrics[name] = mean(stats['shares'][..., i])
    return metrics | dict(
      aux_loss=self.config.sparse.budget_weight * kept_share
    )


def _all_at_once(how, query, key, value, segments, coverage, gates):
  y, stats = sparse_attention(
    query, key, value, segments, segments, coverage, gates, **how
  )
  return y, {name: stats[name] for name in _STATS_DIMS}


def _from_cache(how, *inputs):
  y, cache, stats = cached_sparse_attention(*inputs, **how)
  return y, cache, {name: stats[name] for name in _STATS_DIMS}


def _mean(counts, total, x):
  return (counts * x).sum() / total
