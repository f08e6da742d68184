# SPDX-License-Identifier: Apache-2.0
"""The attention's part of `cost`: parameters, products and rows of the cache.

Letters: D model width, N query heads, K key/value heads, H head width, G groups
of M heads, r rank.
"""

from collections.abc import Callable

from jaxsparse.config import ModelConfig


def attention_parameters(config: ModelConfig, layer: int) -> int:
  """Matrices of one block's attention."""
  heads = 2 * config.num_heads + 2 * config.num_kv_heads
  count = config.model_dim * heads * config.head_dim
  if config.attention_blocks[layer] == 'sparse':
    count += config.model_dim * (3 * config.num_heads + config.num_kv_heads)
    return count + _router_parameters(config)
  return count + _composition_parameters(config)


def _router_parameters(config):
  sparse = config.sparse
  if sparse.router == 'shared':
    return 0
  heads, width = sparse.router_heads, sparse.router_dim
  return config.model_dim * (heads * width + heads + width)


def attention_gains(config: ModelConfig, layer: int) -> int:
  """Gains and biases of one block's attention."""
  query_heads, key_heads = config.num_heads, config.num_kv_heads
  normed = dict(none=0, head=2, projection=query_heads + key_heads)
  gains = normed[config.qk_norm] * config.head_dim
  if config.bias != 'none':
    gains += (query_heads + 2 * key_heads) * config.head_dim
  if config.bias == 'all':
    gains += config.model_dim
  if config.attention_blocks[layer] == 'sparse':
    gains += config.num_kv_heads
  return gains


def _composition_parameters(config):
  """8 r D N + 16 r^2 N^2 / G + 4 D N for four streams; 2 N^2 / G of bases."""
  dcmha = config.dcmha
  if dcmha is None:
    return 0
  heads, streams = config.num_heads, len(dcmha.streams)
  group = heads // dcmha.num_groups
  width = 2 * dcmha.rank * group
  per_stream = config.model_dim * dcmha.num_groups * (width + group)
  per_stream += heads * width * 2 * dcmha.rank
  bases = len(dcmha.places) * heads * group if dcmha.base else 0
  return streams * per_stream + bases


def pair_flops(config: ModelConfig, layer: int, seq_len: int) -> int:
  """FLOPs of one query with all rows that it is multiplied with."""
  heads, width = config.num_heads, config.head_dim
  if config.attention_kinds[layer] == 'sparse':
    flops = 4 * heads * width * rows_read(config, layer, seq_len)
    # A row's part in the means of its block.
    flops += 4 * config.num_kv_heads * width
    return flops + _router_flops(config, seq_len)
  flops = 4 * heads * width
  dcmha = config.composition(layer)
  if dcmha:
    # Reading and writing r vectors, and the gate.
    flops += len(dcmha.streams) * (4 * dcmha.rank + 2) * heads
    if dcmha.base:
      flops += len(dcmha.places) * 2 * heads * heads // dcmha.num_groups
  return flops * rows_read(config, layer, seq_len)


def _router_flops(config, seq_len):
  """Of one query's share of its tile's choice."""
  sparse = config.sparse
  per_block = 2 * config.num_heads * config.head_dim
  if sparse.router == 'indexer':
    per_block = 2 * sparse.router_heads * (sparse.router_dim + 1)
  return per_block * (seq_len // sparse.block) // sparse.tile


def rows_read(config: ModelConfig, layer: int, context: int) -> int:
  """Keys, or summaries of keys, that the last of `context` positions reads."""
  return ROWS_READ[config.attention_kinds[layer]](config, context)


def _sparse_rows_read(config, context):
  sparse = config.sparse
  blocks = sparse.window_blocks + 1 + sparse.max_blocks
  summaries = context // sparse.block if sparse.use_summaries else 0
  return min(blocks * sparse.block + summaries, context)


# By the kind of attention, of the config and the number of positions.
ROWS_READ: dict[str, Callable[[ModelConfig, int], int]] = {
  'global': lambda _, context: context,
  'local': lambda config, context: min(config.window, context),
  'sparse': _sparse_rows_read,
}


def row_bytes(config: ModelConfig, layer: int, bytes_per_value: int) -> int:
  """Of one cached row: key, value, and factors of its token."""
  per_head = config.head_dim * bytes_per_value
  if config.kv_cache == 'int8':
    # A byte each, and a scale in f32.
    per_head = config.head_dim + 4
  num_others, dcmha = 0, config.composition(layer)
  if config.attention_kinds[layer] == 'sparse':
    num_others = config.sparse.router_width
  elif dcmha:
    num_others = dcmha.num_cached * dcmha.num_factors * config.num_heads
  return 2 * config.num_kv_heads * per_head + num_others * bytes_per_value
