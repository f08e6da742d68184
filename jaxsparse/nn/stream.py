# SPDX-License-Identifier: Apache-2.0
"""A residual stream's blocks, unrolled, some with a memory layer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.config.model import block_name
from jaxsparse.nn.attention import cache as attention_cache
from jaxsparse.nn.block import Block, Cache, merged, placements, prefixed
from jaxsparse.nn.layers import Metrics
from jaxsparse.nn.memory.tables import SharedTables


def run_blocks(
  config: ModelConfig,
  x: Float[Array, 'B T D'],
  positions: Int[Array, 'B T'] | Int[Array, 'B T 2'],
  segment_ids: Int[Array, 'B T'],
  cache: Cache | None = None,
  deterministic: bool = True,
  reach: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T D'], Cache | None, Metrics]:
  """Runs all blocks, as modules of the compact method that calls this.

  Args:
    config: of the stream.
    x: the stream before the first block.
    positions: of each token, as `Attention` takes them.
    segment_ids: document of each token; 0 for padding.
    cache: what `transformer.init_cache` makes.
    deterministic: False for dropout.
    reach: the last position that each token sees, if not its own.

  Returns:
    The stream after the last block, without a norm, the extended cache, and
    metrics of all blocks.
  """
  write_of = dict(placements(config))
  block_type = nn.remat(Block) if config.use_remat else Block
  # Memory outputs on their way, by the block after which they are added.
  pending = {}
  metrics: Metrics = dict(aux_loss=jnp.zeros((), jnp.float32))
  new_cache = begun(cache)
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
    x, memory_y, of_block, block_metrics = block(
      x,
      positions,
      segment_ids,
      block_cache(cache, i),
      pending.pop(i, ()),
      tables,
      reach,
    )
    if memory_y is not None:
      write = write_of[i]
      pending[write] = (*pending.get(write, ()), memory_y)
    metrics = merged(metrics, prefixed(block_name(i), block_metrics))
    new_cache = with_block(new_cache, config, i, of_block)
  return x, new_cache, metrics


def begun(cache: Cache | None) -> Cache | None:
  """A cache to which blocks are added; what all share is that of `cache`."""
  return cache and dict(shared=dict(cache['shared']), blocks={})


def block_cache(cache: Cache | None, block: int) -> Cache | None:
  """A block's own cache, with what all blocks share put beside its keys.

  Every block of a kind computes the same extension of the shared arrays from
  the same inputs, which the compiler does once.
  """
  if cache is None:
    return None
  own = cache['blocks'][block_name(block)]
  return dict(own, attention=own['attention'] | cache['shared'])


def with_block(
  cache: Cache | None, config: ModelConfig, block: int, extended: Cache | None
) -> Cache | None:
  """The cache with what a block has made of `block_cache`."""
  if not cache or not extended:
    return cache
  attention = dict(extended['attention'])
  # Of all kinds of rows a block extends those of its own.
  others = {name: attention.pop(name) for name in cache['shared']}
  names = attention_cache.shared_names(config, block)
  shared = cache['shared'] | {name: others[name] for name in names}
  own = {block_name(block): extended | dict(attention=attention)}
  return dict(shared=shared, blocks=cache['blocks'] | own)


def check_split(config: ModelConfig, batch_size: int) -> None:
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
