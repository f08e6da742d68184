# SPDX-License-Identifier: Apache-2.0
"""Parameters, floating-point operations and bytes of a model in closed form.

Two conventions stand side by side. The papers' count is twice the dense
parameters, without embeddings, attention scores and the lookup (UltraMem,
arXiv:2411.12364, Table 1); the full count has every matrix product of the
forward pass and is what model FLOP utilisation is a share of. Letters: D model
width, F feed-forward width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

from jaxsparse.analysis import attention_cost, memory_cost
from jaxsparse.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
  """Numbers of parameters, by the part of the model that holds them."""

  # Token embedding, and the output projection where it is not tied.
  embedding: int
  # Matrices of attention, MLPs, shared experts and routers.
  dense: int
  # Matrices of all routed experts, and of those that one token passes.
  experts: int = 0
  active_experts: int = 0
  # Query maps, convolutions, keys, cores and other maps of memory layers.
  memory: int = 0
  # Rows of the tables of values and pre-values.
  values: int = 0
  # Gains of all norms and all biases, which no paper counts.
  gains: int

  @property
  def total(self) -> int:
    """Every parameter, as counting the leaves of the model gives it."""
    return self.published + self.embedding + self.gains

  @property
  def published(self) -> int:
    """What the papers' tables call parameters: no embeddings, no gains."""
    return self.dense + self.experts + self.memory + self.values

  @property
  def active(self) -> int:
    """What every token uses of `published`: no values."""
    return self.dense + self.active_experts + self.memory


def count_parameters(config: ModelConfig) -> Parameters:
  """Parameters of the model that `config` describes.

  `vocab_size` must be resolved: with 0 the embedding counts as nothing.
  """
  memory, moe = config.memory, config.moe
  num_memories = len(memory.placements) if memory else 0
  num_tables = 1 if config.tie_embeddings else 2
  per_norm = config.model_dim * (2 if config.norm == 'layer' else 1)
  gains = (2 * config.num_layers + 1) * per_norm
  gains += _over_blocks(config, attention_cost.attention_gains)
  dense = _over_blocks(config, attention_cost.attention_parameters)
  experts = active_experts = 0
  if moe:
    one = memory_cost.expert_parameters(moe, config.mlp, config.model_dim)
    router = memory_cost.router_parameters(moe, config.model_dim)
    dense += config.num_layers * (router + moe.num_shared * one)
    experts = config.num_layers * moe.num_experts * one
    active_experts = config.num_layers * moe.num_experts_per_token * one
    gains += config.num_layers * memory_cost.router_biases(moe)
  else:
    dense += _num_mlps(config) * mlp_parameters(config)
    if config.bias == 'all':
      inner = config.mlp_dim * (2 if config.mlp == 'swiglu' else 1)
      gains += _num_mlps(config) * (inner + config.model_dim)
  parameters = Parameters(
    embedding=num_tables * config.vocab_size * config.model_dim,
    dense=dense,
    experts=experts,
    active_experts=active_experts,
    gains=gains,
  )
  for part in config.beside_mlp.values():
    num_layers, width = len(part.blocks), config.model_dim
    parameters = dataclasses.replace(
      parameters,
      memory=parameters.memory + num_layers * part.num_parameters(width),
      values=parameters.values + num_layers * part.num_values(width),
    )
  if not memory:
    return parameters
  in_layers = memory_cost.memory_parameters(memory, config.model_dim)
  return dataclasses.replace(
    parameters,
    memory=parameters.memory + num_memories * in_layers,
    values=parameters.values
    + memory_cost.table_parameters(memory, config.model_dim),
    gains=gains + num_memories * memory_cost.memory_gains(memory),
  )


def paper_flops(config: ModelConfig) -> int:
  """Forward FLOPs per token as the papers count them."""
  return 2 * count_parameters(config).active


def forward_flops(config: ModelConfig, seq_len: int) -> int:
  """FLOPs per token of every matrix product in the forward pass.

  Attention scores count over all `seq_len` positions, masked or not, as
  PaLM's definition of utilisation does (arXiv:2204.02311, appendix B); of a
  local or sparse block over those that a late query can reach.
  Operations that are no products (norms, softmax, top-k) are left out.
  """
  parameters = count_parameters(config)
  blocks = 2 * (parameters.dense + parameters.active_experts)
  scores = _over_blocks(config, attention_cost.pair_flops, seq_len)
  logits = 2 * config.model_dim * config.vocab_size
  flops = blocks + scores + logits
  if config.memory:
    flops += len(config.memory.placements) * memory_cost.memory_flops(
      config.memory, config.model_dim
    )
  for part in config.beside_mlp.values():
    flops += len(part.blocks) * part.forward_flops(config.model_dim)
  return flops


def training_flops(config: ModelConfig, seq_len: int) -> int:
  """FLOPs per token of forward and backward; recomputation does not count."""
  return 3 * forward_flops(config, seq_len)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBytes:
  """Bytes that one decode step of a batch must read, by what they are."""

  # Matrices that every step reads whole, the output projection among them.
  weights: float
  # Experts that at least one token of the batch passes.
  experts: float
  # Rows of values and pre-values.
  values: float
  # Keys, values and factors of the context, as far as it is read.
  cache: float

  @property
  def total(self) -> float:
    return self.weights + self.experts + self.values + self.cache


def decode_bytes(
  config: ModelConfig,
  batch_size: int,
  context: int,
  *,
  bytes_per_value: int = 2,
  is_uniform: bool = False,
) -> DecodeBytes:
  """The least that a decode step of one token per sequence reads.

  Args:
    config: of the model.
    batch_size: sequences B.
    context: tokens before, of each sequence.
    bytes_per_value: of parameters and cache, where it is not quantized.
    is_uniform: expected number of distinct experts and rows where tokens choose
      evenly and on their own, X (1 - (1 - k / X)^B); by default the most there
      can be, min(B k, X), which is what the papers count.
  """
  parameters = count_parameters(config)
  memory, moe = config.sized_memory, config.moe

  def distinct(num_items: int, per_token: int) -> float:
    if is_uniform:
      return num_items * (1 - (1 - per_token / num_items) ** batch_size)
    return float(min(batch_size * per_token, num_items))

  experts = values = 0.0
  if moe:
    share = (
      distinct(moe.num_experts, moe.num_experts_per_token) / moe.num_experts
    )
    experts = share * parameters.experts
  if memory:
    reads = min(memory.num_heads * memory.num_selected, memory.num_slots)
    rows = distinct(memory.num_slots, reads) * len(memory.placements)
    values = rows * (memory.value_dim + memory.pre_value_dim)
  projection = config.vocab_size * config.model_dim
  counts = dict(
    weights=parameters.dense + parameters.memory + projection,
    experts=experts,
    values=values,
  )
  cache = _over_blocks(config, _cache_bytes, context, bytes_per_value)
  return DecodeBytes(
    **{name: float(bytes_per_value * n) for name, n in counts.items()},
    cache=float(cache * batch_size),
  )


def _over_blocks(
  config: ModelConfig, of_block: Callable[..., int], *arguments: int
) -> int:
  """The sum over all blocks, of which those at one place in the pattern agree.

  Args:
    config: of the model.
    of_block: takes the config, the number of a block, and the arguments.
    arguments: of all blocks.
  """
  layers, period = config.num_layers, len(config.attention_pattern)
  return sum(
    len(range(first, layers, period)) * of_block(config, first, *arguments)
    for first in range(min(layers, period))
  )


def _cache_bytes(
  config: ModelConfig, layer: int, context: int, bytes_per_value: int
) -> int:
  """Of a block's cache that a step reads."""
  num_rows = attention_cost.rows_read(config, layer, context)
  return num_rows * attention_cost.row_bytes(config, layer, bytes_per_value)


def mlp_parameters(config: ModelConfig) -> int:
  """Matrices of one MLP."""
  return memory_cost.MATRICES[config.mlp] * config.model_dim * config.mlp_dim


def _num_mlps(config: ModelConfig) -> int:
  """Blocks whose MLP no memory layer replaces."""
  memory = config.memory
  replaced = len(memory.placements) if memory and memory.replaces_mlp else 0
  return config.num_layers - replaced
