# SPDX-License-Identifier: Apache-2.0
"""Parameters and floating-point operations of one memory layer or mixture.

Letters: D model width, q query width, Q logical sub-keys per side, P heads, r
ranks, c cores, k slots selected per head, E pools, W value width, U pre-value
width, X experts, F their width.
"""

import math

from jaxsparse.config.memory import MemoryConfig
from jaxsparse.config.model import MoEConfig
from jaxsparse.ops.memory.product_key import candidates

# Matrices of one MLP.
MATRICES = {'swiglu': 3, 'gelu': 2, 'gelu_erf': 2}


def memory_parameters(memory: MemoryConfig, model_dim: int) -> int:
  """Parameters of one memory layer without tables, gains and biases."""
  memory = memory.for_width(model_dim)
  query = model_dim * (_query_width(memory) + memory.query_conv_taps)
  keys = 2 * _key_heads(memory) * memory.num_logical_keys * _key_width(memory)
  maps = memory.num_pools * memory.value_dim * model_dim
  maps *= memory.output_map + memory.gate
  maps += memory.pre_value_map * memory.pre_value_dim * model_dim
  return query + keys + _core_entries(memory) + maps


def memory_gains(memory: MemoryConfig) -> int:
  """One gain for all queries, one for all keys, the query's bias, addresses."""
  gains = memory.key_dim * (memory.query_norm != 'none')
  gains += _key_width(memory) // memory.num_ranks * (memory.key_norm != 'none')
  gains += memory.query_bias * _query_width(memory)
  return gains + memory.stored_addresses * memory.num_logical_keys**2


def table_parameters(memory: MemoryConfig, model_dim: int) -> int:
  """Values and pre-values of all memory layers of a model."""
  memory = memory.for_width(model_dim)
  width = memory.value_dim + memory.pre_value_dim
  return memory.num_tables * memory.table_rows * width


def memory_flops(memory: MemoryConfig, model_dim: int) -> int:
  """Forward FLOPs per token of one memory layer, scoring and lookup too."""
  memory = memory.for_width(model_dim)
  heads, selected = memory.num_heads, memory.num_selected
  keys = memory.num_logical_keys
  query = 2 * model_dim * (_query_width(memory) + memory.query_conv_taps)
  scores = 2 * heads * 2 * keys * _key_width(memory)
  if memory.grid == 'additive':
    grid = heads * len(candidates(selected)[0])
  else:
    rank = _core_rank(memory)
    # Each of two quadrants pairs half as many rows with half as many columns.
    pairs = selected**2 // (2 if memory.use_two_quadrants else 1)
    merge = 2 * heads * 2 * keys * rank
    products = selected * rank**2 + pairs * rank
    grid = merge + memory.num_cores * heads * 2 * products
  reads = 2 * heads * selected * (memory.value_dim + memory.pre_value_dim)
  pools = memory.num_pools * memory.value_dim
  maps = 2 * model_dim * pools * (memory.output_map + memory.gate)
  maps += 2 * model_dim * memory.pre_value_map * memory.pre_value_dim
  return query + scores + grid + reads + maps


def expert_parameters(moe: MoEConfig, kind: str, model_dim: int) -> int:
  """Parameters of one expert."""
  return MATRICES[kind] * model_dim * moe.expert_dim


def router_parameters(moe: MoEConfig, model_dim: int) -> int:
  """Parameters of one router; its selection biases count among the gains."""
  return model_dim * moe.num_experts


def router_biases(moe: MoEConfig) -> int:
  return moe.num_experts if moe.bias_update_rate else 0


def _query_width(memory: MemoryConfig) -> int:
  """Width of all queries of a token together."""
  copies = dict(shared=1, per_head=memory.num_heads, per_rank=memory.num_ranks)
  return 2 * memory.key_dim * copies[memory.query]


def _key_heads(memory: MemoryConfig) -> int:
  return 1 if memory.share_keys else memory.num_heads


def _key_width(memory: MemoryConfig) -> int:
  """Width of a sub-key, all ranks together."""
  return memory.key_dim * (1 if memory.split_key_dim else memory.num_ranks)


def _core_rank(memory: MemoryConfig) -> int:
  sets = math.isqrt(memory.expansion) if memory.cores_per_pairing else 1
  return sets * memory.num_ranks


def _core_entries(memory: MemoryConfig) -> int:
  if memory.grid == 'additive':
    return 0
  return memory.num_cores * memory.num_heads * _core_rank(memory) ** 2
