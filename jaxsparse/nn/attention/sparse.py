# SPDX-License-Identifier: Apache-2.0
"""The part of a sparse attention between projections and output map.

See `ops.sparse_attention`. The parameters are gates of the three sets that a
query reads, the share of importance that its kept blocks are to cover, and a
router's.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import ModelConfig, SparseAttentionConfig
from jaxsparse.nn.attention import rotation
from jaxsparse.nn.attention.maps import show, show_arrays
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import Metrics, weight
from jaxsparse.nn.leading import Leading
from jaxsparse.ops.attention import slot_rows
from jaxsparse.ops.attention.rope import rotate
from jaxsparse.ops.memory import usage
from jaxsparse.ops.quantized_rows import QuantizedRows
from jaxsparse.ops.sparse_attention import bounded_slots
from jaxsparse.ops.sparse_attention.block_router import Router, no_router
from jaxsparse.ops.sparse_attention.bounded_history import (
  BoundedCache,
  bounded_attention,
  init_bounded_cache,
)
from jaxsparse.ops.sparse_attention.ragged_cache import (
  num_skipped,
  unpadded_cached_attention,
)
from jaxsparse.ops.sparse_attention.sparse_attention import sparse_attention
from jaxsparse.ops.sparse_attention.sparse_cache import (
  SparseCache,
  init_sparse_cache,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)
from jaxsparse.ops.token_product import token_product

# Letters of a cache's arrays; Z and k are no letters of the mesh.
_CACHE_DIMS = SparseCache(
  key='BK..', value='BK..', segments='B.',
  summary_key='BK..', summary_value='BK..',
  summary_count='B.', summary_segment='B.',
  router_key='B..', summary_router_key='B..',
  kept_block='BK.', is_kept='BK.',
)  # fmt: skip
_INPUT_DIMS = SparseInputs(
  query='BTN.', key='BTK.', value='BTK.', segments='BT', coverage='BTK',
  gates='BTN.', router=Router('BT..', 'BT.', 'BT.'),
)  # fmt: skip
_STATS_DIMS = dict(kept='BK.', eligible='BK.', shares='BK..')
_CHOICE_DIMS = dict(
  block='BK..', is_kept='BK..', entropy='BK.', router_loss='BK.'
)


def _whole(dims):
  """The dims with all heads on every device: they agree what is forgotten."""
  return jax.tree.map(lambda d: d.replace('K', '.').replace('N', '.'), dims)


def _cache_dims(config):
  if config.kv_cache == 'exact':
    return _CACHE_DIMS
  rows = QuantizedRows('BK..', 'BK.')
  return _CACHE_DIMS._replace(key=rows, value=rows)


def _bounded_dims(config):
  return BoundedCache(_whole(_cache_dims(config)), worth='B.', seen='B.')


_SETS = ('window', 'kept', 'summary')


def make_options(config: SparseAttentionConfig) -> SparseOptions:
  return SparseOptions(
    block=config.block,
    tile=config.tile,
    window_blocks=config.window_blocks,
    max_blocks=config.max_blocks,
    min_blocks=config.min_blocks,
    min_fraction=config.min_fraction,
    max_fraction=config.max_fraction,
    use_summaries=config.use_summaries,
    combine=config.combine,
  )


def init_rows(
  config: ModelConfig, batch_size: int, length: int
) -> dict[str, Any]:
  """A sparse layer's part of a decoding cache."""
  sparse, dtype = config.sparse, jnp.dtype(config.dtype)
  sizes = (batch_size, config.num_kv_heads)
  options, is_quantized = make_options(sparse), config.kv_cache == 'int8'
  if sparse.history_blocks:
    cache = init_bounded_cache(
      *sizes,
      config.head_dim,
      options,
      sparse.history_blocks,
      dtype,
      sparse.router_width,
      is_quantized,
    )
    all_dims = _bounded_dims(config)
  else:
    cache = init_sparse_cache(
      *sizes, length, config.head_dim, options, dtype, sparse.router_width,
      is_quantized,
    )  # fmt: skip
    all_dims = _cache_dims(config)
  placed = jax.tree.map(
    lambda dims, x: mesh.reshard(x, mesh.act(dims)), all_dims, cache
  )
  return placed._asdict()


def forget(
  config: ModelConfig, rows: dict[str, Any], index: Int[Array, '1']
) -> dict[str, Any]:
  """A layer's part of one slot, with room for the token after `index` others.

  Only where the history is bounded, and only at a block's first token.
  """
  options = make_options(config.sparse)

  def on_device(cache, index):
    return (bounded_slots.forget(cache, index[0], options),)

  dims = _bounded_dims(config)
  run = mesh.per_device(on_device, (dims, 'B'), (dims,))
  old = BoundedCache(*(rows[name] for name in BoundedCache._fields))
  return rows | run(old, index)[0]._asdict()


def reads_unrotated(config: ModelConfig, has_cache: bool) -> bool:
  """Whether a sparse layer rotates queries and keys itself: by their rows."""
  return has_cache and config.sparse.history_blocks > 0


class SparseAttention(nn.Module):
  """Reads a window, the blocks that it chooses, and summaries of the others.

  Leaves: `gate` [D, N, 3], `coverage` [D, K] and `coverage_bias` [K]. At the
  start all sets count as they are and nearly all importance is covered. With an
  indexer also `router_query` [D, J, I], `router_weight` [D, J] and `router_key`
  [D, I].
  """

  config: ModelConfig
  # To train an indexer by all blocks: none is left out, and what it learns is
  # the only metric.
  keeps_all: bool = False
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(returns=('tokens', 'cache', 'alike'))
  def __call__(
    self,
    x: Num[Array, '*S D'],
    query: Float[Array, '*S N H'],
    key: Float[Array, '*S K H'],
    value: Float[Array, '*S K H'],
    segment_ids: Int[Array, '*S'],
    cache: dict[str, Any] | None = None,
  ) -> tuple[Float[Array, '*S N H'], dict[str, Any] | None, Metrics]:
    """Sums of the values, the extended cache, and metrics.

    Queries and keys are rotated unless `reads_unrotated`. With a cache that is
    not bounded, padding before a sequence's first token takes no rows: it would
    shift the block layout.

    The metrics are means over tiles with an eligible block: 'kept_share' of
    these blocks and their number 'kept_blocks', and the shares of the softmax
    in 'window', 'kept' and 'summary'; without a cache the 'router_entropy' of
    the blocks' importance in nats, and an indexer's 'router_loss', which is its
    'aux_loss'; 'sparsity_loss' is the weighted 'kept_share'. 'coverage', its
    least and most are those of all tokens. Padding counts nowhere.
    """
    lead = Leading.of(x)
    arrays = dict(
      x=x, query=query, key=key, value=value, segment_ids=segment_ids
    )
    y, new_cache, metrics = self._attend(
      **{name: lead.flat(array, name) for name, array in arrays.items()},
      cache=None if lead.is_empty else cache,
    )
    cache = cache if lead.is_empty else new_cache
    return lead.restored(y), cache, lead.metrics(metrics)

  def _attend(self, x, query, key, value, segment_ids, cache):
    """`__call__` of sequences [B, T, ...]."""
    sparse = self.config.sparse
    options = make_options(sparse)
    gates, coverage = self._gates_and_coverage(x)
    if self.keeps_all:
      all_blocks = -(-x.shape[1] // sparse.block)
      options = dataclasses.replace(
        options, max_blocks=all_blocks, max_fraction=0.0
      )
      coverage = jnp.full_like(coverage, jnp.inf)
    inputs = SparseInputs(
      query, key, value, segment_ids, coverage, gates, self._router(x)
    )
    if cache is None:
      run = mesh.per_device(
        lambda inputs: sparse_attention(inputs, options),
        (_INPUT_DIMS,),
        ('BTN.', _STATS_DIMS | _CHOICE_DIMS),
      )
      y, stats = run(inputs)
      self._show(run, inputs, stats)
    else:
      y, cache, stats = self._from_cache(inputs, options, cache)
    return y, cache, self._metrics(stats, coverage, segment_ids > 0)

  def _show(self, run, inputs, stats):
    def read(value):
      return run(inputs._replace(value=value))[0]

    show(self, inputs.value, weights=read)
    show_arrays(self, coverage=inputs.coverage, **stats)

  def _from_cache(self, inputs, options, cache):
    lengths, segments = cache['lengths'], inputs.segments
    has_slots = slot_rows.has_slots(cache)
    if has_slots:
      count, skipped = slot_rows.num_tokens(segments), 0 * lengths
    else:
      skipped = num_skipped(segments, lengths)
      count = segments.shape[1] - skipped
    cache = cache | dict(lengths=lengths + count)
    if has_slots and reads_unrotated(self.config, has_cache=True):
      kind, rows, dims_of_rows = BoundedCache, (lengths, count), ('B', 'B')

      def attend(*arrays):
        return bounded_slots.attention(*arrays, options, self._rotate())

    elif reads_unrotated(self.config, has_cache=True):
      kind, rows, dims_of_rows = BoundedCache, (cache['index'],), ('',)

      def attend(inputs, cache, index):
        return bounded_attention(inputs, cache, index, options, self._rotate())

    else:
      kind, rows = SparseCache, (lengths, skipped, count)
      dims_of_rows = ('B', 'B', 'B')

      def attend(*arrays):
        return unpadded_cached_attention(*arrays, options)

    def on_device(*arrays):
      y, new, stats = attend(*arrays)
      return y, new, {name: stats[name] for name in _STATS_DIMS}

    of_cache = _cache_dims(self.config)
    of_inputs, of_y, of_stats = _INPUT_DIMS, 'BTN.', _STATS_DIMS
    if kind is BoundedCache:
      of_cache = _bounded_dims(self.config)
      of_inputs, of_y, of_stats = _whole((of_inputs, of_y, of_stats))
    run = mesh.per_device(
      on_device,
      (of_inputs, of_cache, *dims_of_rows),
      (of_y, of_cache, of_stats),
    )
    old = kind(*(cache[name] for name in kind._fields))
    y, new, stats = run(inputs, old, *rows)
    return y, cache | new._asdict(), stats

  def _rotate(self):
    return functools.partial(rotate, **rotation.settings(self.config))

  def _zeros(self, name, dims, *shape):
    init = mesh.sharded(nn.initializers.zeros, mesh.param(dims))
    return mesh.gather(self.param(name, init, shape), dims)

  def _gates_and_coverage(self, x):
    config, model_dim = self.config, x.shape[-1]
    x = x.astype(jnp.float32)
    gate = self._zeros('gate', 'DN.', model_dim, config.num_heads, 3)
    matrix = self._zeros('coverage', 'DK', model_dim, config.num_kv_heads)
    init = nn.initializers.constant(config.sparse.coverage_logit)
    bias = self.param(
      'coverage_bias',
      mesh.sharded(init, mesh.param('K')),
      (config.num_kv_heads,),
    )
    gates = jax.nn.sigmoid(token_product('d,dng->ng', x, gate))
    if config.sparse.combine == 'merged':
      gates *= 2
    logits = token_product('d,dk->k', x, matrix)
    coverage = jax.nn.sigmoid(logits + bias[None, None])
    return gates, coverage

  def _router(self, x):
    sparse, model_dim = self.config.sparse, x.shape[-1]
    if sparse.router == 'shared':
      return no_router(*x.shape[:2], x.shape[1])
    # Nothing before it learns by the router's loss.
    x = jax.lax.stop_gradient(x)
    heads, width = sparse.router_heads, sparse.router_dim

    def projected(name, dims, letters, *shape):
      matrix = weight(
        self, name, dims, (model_dim, *shape), 1 / model_dim, x.dtype
      )
      y = token_product(
        f'd,d{letters}->{letters}', x, matrix, dtype=jnp.float32
      )
      return mesh.reshard(y, mesh.act('BT' + '.' * len(shape)))

    return Router(
      projected('router_query', 'D..', 'ji', heads, width),
      projected('router_weight', 'D.', 'j', heads),
      projected('router_key', 'D.', 'i', width),
    )

  def _metrics(self, stats, coverage, is_token):
    eligible = stats['eligible'].astype(jnp.float32)
    counts = (eligible > 0).astype(jnp.float32)
    total = jnp.maximum(mesh.total(counts.sum()), 1.0)
    mean = functools.partial(_mean, counts, total)
    sparse, metrics = self.config.sparse, {}
    if 'entropy' in stats:
      metrics['router_entropy'] = mean(stats['entropy'])
    if sparse.router == 'indexer' and 'router_loss' in stats:
      metrics['router_loss'] = mean(stats['router_loss'])
      metrics['aux_loss'] = metrics['router_loss']
    if self.keeps_all:
      return metrics
    is_token = is_token[..., None]
    kept_share = mean(stats['kept'] / jnp.maximum(eligible, 1.0))
    metrics |= dict(
      kept_share=kept_share,
      kept_blocks=mean(stats['kept']),
      coverage=usage.mean_over_tokens(coverage, is_token[..., 0]).mean(),
      # A coverage is between 0 and 1.
      coverage_least=mesh.least(coverage.min(where=is_token, initial=1.0)),
      coverage_most=mesh.most(coverage.max(where=is_token, initial=0.0)),
      sparsity_loss=sparse.sparsity_loss_weight * kept_share,
    )
    for i, name in enumerate(_SETS):
      metrics[name] = mean(stats['shares'][..., i])
    return metrics


def _mean(counts, total, x):
  return mesh.total((counts * x).sum()) / total
