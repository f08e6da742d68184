# SPDX-License-Identifier: Apache-2.0
"""The language model: its blocks, unrolled, some with a memory layer."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.config.model import block_name
from jaxsparse.nn.attention import cache as attention_cache
from jaxsparse.nn.block import (
  Block,
  Cache,
  merged,
  placements,
  prefixed,
)
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import (
  NORMS,
  Embed,
  Metrics,
  init_variances,
  project_to_vocabulary,
  weight,
)
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.memory.context import init_ring
from jaxsparse.nn.memory.tables import SharedTables


def init_cache(
  config: ModelConfig, batch_size: int, length: int, has_slots: bool = False
) -> Cache:
  """An empty decoding cache with room for `length` tokens of each sequence.

  Prompts of unequal length are padded on the left with segment id 0; rows are
  written in the order in which tokens are fed, at one index for the batch but
  for sparse attention, whose rows begin with the first token.

  With slots each sequence has its own index: of what is fed at once its tokens
  come first, then padding, which leaves nothing behind. Rows of padding must
  fit, too. A sequence of padding alone stays as it is. See `bounded_slots` for
  histories of bounded size.

  Raises:
    UserError: a size does not fit the mesh.
  """
  _check_split(config, batch_size)
  blocks = {
    block_name(i): dict(
      attention=attention_cache.init_rows(config, i, batch_size, length)
    )
    for i in range(config.num_layers)
  }
  for read, _ in placements(config):
    if config.memory and config.memory.query_conv_taps > 1:
      blocks[block_name(read)]['memory'] = init_ring(
        batch_size,
        config.memory.query_conv_taps,
        config.model_dim,
        config.dtype,
      )
  shared = attention_cache.init_shared(config, batch_size, length, has_slots)
  return dict(shared=shared, blocks=blocks)


def init_params(config: ModelConfig, key: jax.Array) -> Any:
  """Drawn parameters, laid as the mesh in use wants them."""
  # Divisible however tokens are split.
  tokens = jnp.ones((mesh.num_token_shards(), 1), jnp.int32)
  return Transformer(config).init(key, tokens)['params']


class Transformer(nn.Module):
  """Decoder-only language model; its blocks are `block_00`, `block_01`, ...

  Attributes:
    config: of the model.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`. On
      such a mesh tables and experts are split, and all else is whole on each
      device: tensor parallelism is for our own mesh (`mesh.make_mesh`).
  """

  config: ModelConfig
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(
    returns=('tokens', 'cache', 'alike'),
    has_width=False,
    takes_any_batch=False,
  )
  def __call__(
    self,
    tokens: Num[Array, '*S'],
    positions: Int[Array, '*S'] | None = None,
    segment_ids: Int[Array, '*S'] | None = None,
    cache: Cache | None = None,
    deterministic: bool = True,
    logits_at: Num[Array, '*B'] | None = None,
  ) -> tuple[Float[Array, '... V'], Cache | None, Metrics]:
    """Scores of the token after each of `tokens`.

    Args:
      tokens: the new tokens; the last dimension is that of positions, and the
        cache has one batch of all before it.
      positions: position of each in its document, by default that in its row.
      segment_ids: 0 for padding, 1, 2, ... for the documents of a row, of which
        there is one by default.
      cache: what `init_cache` made and earlier calls returned; None when
        nothing comes before `tokens`.
      deterministic: False for dropout, which needs the rng 'dropout'.
      logits_at: of each sequence the one place in `tokens`, from 0 on, whose
        scores are wanted; by default all. Those of a prompt's other tokens cost
        as much as some blocks. Beyond the last token scores are NaN.

    Returns:
      Logits in float32, with `logits_at` of one position; the extended cache;
      float32 scalars such as 'block_01/memory/usage_kl', and sums over all
      layers: 'aux_loss', and with sparse attention 'sparsity_loss'.

    Raises:
      UserError: a size does not fit the mesh, vocab_size is not set, `tokens`
        are no integers, or `logits_at` has another shape than a sequence each.
    """
    lead = Leading.of_tokens(tokens)
    num_sequences = 0 if lead.is_empty else math.prod(lead.shape[:-1])
    _check_sizes(self.config, num_sequences)
    positions, segment_ids = lead.places(positions, segment_ids)
    at = lead.flat_at(logits_at, 'logits_at')
    logits, new_cache, metrics = self._run(
      lead.flat(tokens, 'tokens'),
      lead.flat(positions, 'positions'),
      lead.flat(segment_ids, 'segment_ids'),
      None if lead.is_empty else cache,
      deterministic,
      None if lead.is_empty else at,
    )
    if logits_at is not None:
      lead = lead.of_one()
    cache = cache if lead.is_empty else new_cache
    return lead.restored(logits), cache, lead.metrics(metrics)

  def _run(
    self, tokens, positions, segment_ids, cache, deterministic, logits_at
  ):
    """`__call__` of sequences [B, T]."""
    config = self.config
    tokens, positions, segment_ids = (
      mesh.reshard(array, mesh.act('BT'))
      for array in (tokens, positions, segment_ids)
    )
    embed = Embed(
      config.vocab_size, config.model_dim, config.dtype, name='embed'
    )
    x, cache, metrics = self._blocks(
      embed(tokens), positions, segment_ids, cache, deterministic
    )
    if logits_at is not None:
      x = mesh.over_tokens(_rows_at)(x, logits_at)
    norm = NORMS[config.norm]
    x = norm(config.norm_epsilon, dtype=config.dtype, name='final_norm')(x)
    if config.tie_embeddings:
      return embed.logits(x), cache, metrics
    width = config.model_dim
    shape = (config.vocab_size, width)
    variance, _ = init_variances(
      config.init_deviations, width, width, config.num_layers
    )
    table = weight(self, 'output', 'VD', shape, variance, config.dtype)
    return project_to_vocabulary(x, table), cache, metrics

  def _blocks(self, x, positions, segment_ids, cache, deterministic):
    config = self.config
    write_of = dict(placements(config))
    block_type = nn.remat(Block) if config.use_remat else Block
    # Memory outputs on their way, by the block after which they are added.
    pending = {}
    metrics: Metrics = dict(aux_loss=jnp.zeros((), jnp.float32))
    new_cache = None
    if cache is not None:
      new_cache = dict(shared=dict(cache['shared']), blocks={})
    tables = None
    if config.memory and config.memory.shared_rows:
      tables = SharedTables(
        config.memory,
        config.model_dim,
        config.num_layers,
        config.dtype,
        name='memory',
      )()
    for i in range(config.num_layers):
      block = block_type(config, i, deterministic, name=block_name(i))
      x, memory_y, block_cache, block_metrics = block(
        x,
        positions,
        segment_ids,
        _block_cache(cache, i),
        pending.pop(i, ()),
        tables,
      )
      if memory_y is not None:
        write = write_of[i]
        pending[write] = (*pending.get(write, ()), memory_y)
      metrics = merged(metrics, prefixed(block_name(i), block_metrics))
      if new_cache and cache and block_cache:
        new_cache['blocks'][block_name(i)] = block_cache
        extended = _split_shared(block_cache, cache['shared'])
        names = attention_cache.shared_names(config, i)
        new_cache['shared'] |= {name: extended[name] for name in names}
    return x, new_cache, metrics


def _rows_at(x: Float[Array, 'B T D'], index: Int[Array, 'B']):
  return jnp.take_along_axis(x, index[:, None, None], axis=1)


def _block_cache(cache: Cache | None, block: int) -> Cache | None:
  """A block's own cache, with what all blocks share put beside its keys.

  Every block of a kind computes the same extension of the shared arrays from
  the same inputs, which the compiler does once.
  """
  if cache is None:
    return None
  own = cache['blocks'][block_name(block)]
  return dict(own, attention=own['attention'] | cache['shared'])


def _split_shared(block_cache: Cache, shared: Cache) -> Cache:
  """Takes the shared arrays out of `block_cache` again and returns them."""
  return {name: block_cache['attention'].pop(name) for name in shared}


def _check_sizes(config: ModelConfig, batch_size: int) -> None:
  if config.vocab_size < 1:
    raise UserError(
      'vocab_size must be set before the model is built, '
      f'got {config.vocab_size}.'
    )
  _check_split(config, batch_size)


def _check_split(config: ModelConfig, batch_size: int) -> None:
  """Refuses what the mesh in use cannot split evenly."""
  sizes = dict(
    num_heads=(config.num_heads, 'N'),
    num_kv_heads=(config.num_kv_heads, 'K'),
    mlp_dim=(config.mlp_dim, 'F'),
    model_dim=(config.model_dim, 'D'),
    batch_size=(batch_size, 'B'),
  )
  for name, (size, dim) in sizes.items():
    axes, num_shards = mesh.shards(dim)
    if size % num_shards:
      raise UserError(
        f'{name} must be a multiple of {num_shards}, the size of the mesh '
        f'along {axes}; got {size}.'
      )
