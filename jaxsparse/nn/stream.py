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
      reach,
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
