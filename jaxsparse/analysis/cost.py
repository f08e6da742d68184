"""Parameters and floating-point operations in closed form.

Two conventions stand side by side. The papers' count is twice the dense
parameters, without embeddings, attention scores and the lookup (UltraMem,
arXiv:2411.12364, Table 1); the full count has every matrix product of the
forward pass and is what model FLOP utilisation is a share of. Letters: D model
width, F feed-forward width, V vocabulary, Q logical sub-keys per side, W value
width, m slots kept per head.
"""

import dataclasses

from jaxsparse.config import MemoryConfig, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
  """Numbers of parameters, by the part of the model that holds them."""

  # Token embedding, and the output projection where it is not tied.
  embedding: int
  # Matrices of attention and MLP.
  dense: int
  # Query maps, convolutions, keys, cores and output maps of memory layers.
  memory: int
  # Rows of the value tables.
  values: int
  # Gains of all norms, which no paper counts.
  gains: int

  @property
  def total(self) -> int:
    """Every parameter, as counting the leaves of the model gives it."""
    return self.published + self.embedding + self.gains

  @property
  def published(self) -> int:
    """What the papers' tables call parameters: no embeddings, no gains."""
    return self.dense + self.memory + self.values

  @property
  def active(self) -> int:
    """What every token uses of `published`: no values."""
    return self.dense + self.memory


def count_parameters(config: ModelConfig) -> Parameters:
  """Parameters of the model that `config` describes.

  `vocab_size` must be resolved: with 0 the embedding counts as nothing.
  """
  num_memories = len(config.memory.placements) if config.memory else 0
  num_tables = 1 if config.tie_embeddings else 2
  gains = (2 * config.num_layers + 1) * config.model_dim
  if config.use_qk_norm:
    gains += 2 * config.num_layers * config.head_dim
  parameters = Parameters(
    embedding=num_tables * config.vocab_size * config.model_dim,
    dense=config.num_layers * (_attention(config) + _mlp(config)),
    memory=0,
    values=0,
    gains=gains,
  )
  if not config.memory:
    return parameters
  memory = config.memory
  return dataclasses.replace(
    parameters,
    memory=num_memories * memory_parameters(memory, config.model_dim),
    values=num_memories * memory.table_rows * memory.value_dim,
    gains=gains + num_memories * _memory_gains(memory),
  )


def memory_parameters(memory: MemoryConfig, model_dim: int) -> int:
  """Dense parameters of one UltraMem layer, without its two gains."""
  rank, heads = memory.tucker_rank, memory.num_heads
  query = model_dim * (2 * memory.key_dim + memory.query_conv_taps)
  keys = 2 * heads * memory.num_logical_keys * _key_width(memory)
  cores = memory.num_cores * heads * rank**2
  output = memory.expansion * memory.value_dim * model_dim
  return query + keys + cores + output


def paper_flops(config: ModelConfig) -> int:
  """Forward FLOPs per token as the papers count them."""
  return 2 * count_parameters(config).active


def forward_flops(config: ModelConfig, seq_len: int) -> int:
  """FLOPs per token of every matrix product in the forward pass.

  Attention scores count over all `seq_len` positions, masked or not, as
  PaLM's definition of utilisation does (arXiv:2204.02311, appendix B).
  Operations that are no products (norms, softmax, top-k) are left out.
  """
  blocks = 2 * config.num_layers * (_attention(config) + _mlp(config))
  scores = 4 * config.num_layers * config.num_heads * config.head_dim * seq_len
  logits = 2 * config.model_dim * config.vocab_size
  flops = blocks + scores + logits
  if config.memory:
    flops += len(config.memory.placements) * memory_flops(
      config.memory, config.model_dim
    )
  return flops


def training_flops(config: ModelConfig, seq_len: int) -> int:
  """FLOPs per token of forward and backward; recomputation does not count."""
  return 3 * forward_flops(config, seq_len)


def memory_flops(memory: MemoryConfig, model_dim: int) -> int:
  """Forward FLOPs per token of one UltraMem layer, scoring and lookup too."""
  rank, heads = memory.tucker_rank, memory.num_heads
  selected, keys = memory.num_selected, memory.num_logical_keys
  # Each of two quadrants pairs half as many rows with half as many columns.
  pairs = selected**2 // (2 if memory.use_two_quadrants else 1)
  query = 2 * model_dim * (2 * memory.key_dim + memory.query_conv_taps)
  scores = 2 * heads * 2 * keys * _key_width(memory)
  merge = 2 * heads * 2 * keys * rank
  cores = memory.num_cores * heads * 2 * (selected * rank**2 + pairs * rank)
  pooling = 2 * heads * selected * memory.value_dim
  output = 2 * memory.expansion * memory.value_dim * model_dim
  return query + scores + merge + cores + pooling + output


def product_key_parameters(
  model_dim: int,
  num_keys: int,
  key_dim: int,
  *,
  num_heads: int,
  is_query_shared: bool = False,
  output_dim: int = 0,
) -> int:
  """Dense parameters of one product-key memory layer (arXiv:1907.05242).

  Args:
    model_dim: width D.
    num_keys: sub-keys per side.
    key_dim: width of a sub-key.
    num_heads: retrieval heads, each with sub-keys of its own.
    is_query_shared: one query for all heads.
    output_dim: width of the values that an output map brings to D; 0: none.
  """
  query = 2 * model_dim * key_dim * (1 if is_query_shared else num_heads)
  keys = 2 * num_heads * num_keys * key_dim
  return query + keys + output_dim * model_dim


def moe_parameters(
  model_dim: int, expert_dim: int, *, num_experts: int, num_used: int
) -> int:
  """Parameters of one layer of two-matrix experts and its router.

  `num_used` experts count: all of them for the size, those that are selected
  per token for the FLOPs.
  """
  return model_dim * (num_experts + 2 * num_used * expert_dim)


def _attention(config: ModelConfig) -> int:
  heads = 2 * config.num_heads + 2 * config.num_kv_heads
  return config.model_dim * heads * config.head_dim


def _mlp(config: ModelConfig) -> int:
  num_matrices = {'swiglu': 3, 'gelu': 2}[config.mlp]
  return num_matrices * config.model_dim * config.mlp_dim


def _key_width(memory: MemoryConfig) -> int:
  """Width of a sub-key, all ranks together."""
  return memory.key_dim * (1 if memory.split_key_dim else memory.tucker_rank)


def _memory_gains(memory: MemoryConfig) -> int:
  """One gain for both queries, and one for the keys of every rank."""
  return memory.key_dim + _key_width(memory) // memory.tucker_rank
