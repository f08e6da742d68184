# SPDX-License-Identifier: Apache-2.0
"""The model's part of the configuration, see `config`."""

import dataclasses
import functools

from jaxsparse.config import fields
from jaxsparse.config.attention import (
  DCMHAConfig,
  RopeScalingConfig,
  SparseAttentionConfig,
)
from jaxsparse.config.errors import (
  require,
  require_at_most,
  require_choice,
  require_not_negative,
  require_positive,
  require_unset,
)
from jaxsparse.config.memory import MemoryConfig

# Of which costs are summed one by one.
MOST_LAYERS = 10_000

ATTENTION_KINDS = ('global', 'local', 'sparse')

KV_CACHES = ('exact', 'int8')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MoEConfig:
  """A mixture of experts in place of every block's MLP, of the same kind."""

  # Experts X.
  num_experts: int = 8
  # Experts k that a token passes.
  num_experts_per_token: int = 2
  # Inner width F of one expert.
  expert_dim: int = 256
  # Experts of the same width that every token passes besides.
  num_shared: int = 0
  # What makes a weight of a router score: 'softmax' over all experts, or
  # 'sigmoid' (DeepSeek-V3).
  router: str = 'softmax'
  # Divide the kept weights by their sum.
  normalize_weights: bool = True
  # Coefficient of the load-balance loss (Switch, eq. 4 to 6); 0 for none.
  balance_loss_weight: float = 0.01
  # Coefficient of the loss on the router's log-partition (ST-MoE, eq. 5).
  router_z_loss_weight: float = 1e-3
  # Step by which a selection bias of each expert moves against its load, the
  # balancing without a loss of arXiv:2408.15664; 0 for none.
  bias_update_rate: float = 0.0

  def __post_init__(self):
    fields.check(self)
    require_positive(self, 'num_experts', 'num_experts_per_token', 'expert_dim')
    require_choice(self, 'router', ('softmax', 'sigmoid'))
    require_not_negative(
      self, 'num_shared', 'balance_loss_weight', 'router_z_loss_weight'
    )
    require_not_negative(self, 'bias_update_rate')
    require(
      self.num_experts_per_token <= self.num_experts,
      f'num_experts_per_token must be at most num_experts = '
      f'{self.num_experts}, got {self.num_experts_per_token}.',
    )
    require_unset(
      self,
      self.num_experts_per_token == self.num_experts,
      'num_experts_per_token = num_experts, all of them',
      'balance_loss_weight',
      'bias_update_rate',
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class BesideMLP:
  """A layer of your own that reads what the MLPs of some blocks read.

  Its output is added to theirs. A field of `ModelConfig` that holds a subclass,
  and the module of that name in `nn.block.BESIDE_MLP`, make a new layer.
  """

  # Blocks that have the layer.
  blocks: tuple[int, ...] = (0,)

  def __post_init__(self):
    fields.check(self)

  def num_parameters(self, model_dim: int) -> int:
    """Of one layer, without rows of tables."""
    raise NotImplementedError

  def num_values(self, model_dim: int) -> int:
    """In the rows of one layer's tables."""
    del model_dim
    return 0

  def forward_flops(self, model_dim: int) -> int:
    """Of one layer and token."""
    raise NotImplementedError


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
  """A transformer's stream of blocks, by default of a decoder-only model."""

  # Blocks L.
  num_layers: int = 4
  # Width D of the residual stream.
  model_dim: int = 128
  # Query heads N.
  num_heads: int = 4
  # Key/value heads K, a divisor of num_heads; equal to it without grouping.
  num_kv_heads: int = 4
  # Width H of one head.
  head_dim: int = 32
  # Inner width F of the MLP (of each of gate and up for 'swiglu').
  mlp_dim: int = 512
  # 'swiglu', 'gelu' (by tanh, as GPT-2) or 'gelu_erf' (exact, as Pythia).
  mlp: str = 'swiglu'
  # Rows V of the embedding; 0 takes the tokenizer's size.
  vocab_size: int = 0
  # One table for the embedding and the output projection.
  tie_embeddings: bool = True
  # RMSNorm on queries and keys of the attention: 'none', 'head' over each head
  # (Qwen3), or 'projection' over all heads of a token together (OLMoE).
  qk_norm: str = 'none'
  # What the blocks' attention sees, a pattern that repeats over the blocks:
  # 'global' for all earlier positions, 'local' for those of the window,
  # 'sparse' for what `sparse` says.
  attention_pattern: tuple[str, ...] = ('global',)
  # Positions that a query of a local block sees, its own among them.
  window: int = 256
  # Whether a position sees no later ones. Without it, as an encoder, it sees
  # all of its document, and a local block's window lies on both sides.
  is_causal: bool = True
  # Queries at once, 0 for all of a call. With it, memory for scores grows with
  # the sequence's length and not with its square.
  query_chunk: int = 0
  # Of global and local blocks without composition in training: 'xla', a kernel
  # of a library, 'pallas' (TPU, GPU) or 'cudnn' (GPU), or 'auto' for what runs
  # here (`ops.attention.libraries`).
  attention_implementation: str = 'auto'
  # How decoding keeps the keys and values of earlier tokens: 'exact', as they
  # are, or 'int8', with a scale for each token and head (`ops.quantized_rows`).
  kv_cache: str = 'exact'
  # Composition of heads of global and local blocks; None for heads that do not
  # meet.
  dcmha: DCMHAConfig | None = None
  # Of the sparse blocks.
  sparse: SparseAttentionConfig | None = None
  # Longest wavelength of the rotary embedding, in positions.
  rope_max_wavelength: float = 10_000.0
  # Share of a head's coordinates that it rotates, the first ones.
  rope_fraction: float = 1.0
  # Lower frequencies of it, for sequences longer than were trained on first;
  # None for those of the formula.
  rope_scaling: RopeScalingConfig | None = None
  # Norm of the residual stream: 'rms', or 'layer' with mean and bias.
  norm: str = 'rms'
  # Where it stands: 'pre', on what attention and MLP read, or 'post', on what
  # they add (OLMo 2). Memory layers then read the stream as it is, as the MLP
  # does, and what they add stays as it is.
  norm_placement: str = 'pre'
  # Added to the mean square in every norm.
  norm_epsilon: float = 1e-5
  # In those of queries and keys; 0 for norm_epsilon.
  qk_norm_epsilon: float = 0.0
  # Standard deviations at the start: of the matrices of attention and MLPs that
  # read the residual stream and of the head, and of those that write to it. 0
  # for 1 / sqrt(fan-in), and for this over sqrt(2 num_layers). Without experts
  # and memories, which have their own.
  init_deviations: tuple[float, float] = (0.0, 0.0)
  # Biases: 'none', 'qkv' of queries, keys and values (Qwen2), or 'all' in every
  # product of attention and MLPs (Pythia); the logits have none.
  bias: str = 'none'
  # Attention and MLP of a block read the same residual stream (GPT-J).
  parallel_block: bool = False
  # Dropout on each mixer's output while training.
  dropout_rate: float = 0.0
  # The memory layers; None for a dense model.
  memory: MemoryConfig | None = None
  # Experts in place of the MLPs; None for MLPs.
  moe: MoEConfig | None = None
  # Type of activations: 'float32', 'bfloat16', or 'float16' for GPUs without
  # bfloat16; training then scales the loss so that gradients fit.
  dtype: str = 'float32'
  # Recompute each block in the backward pass instead of keeping its inside.
  use_remat: bool = False

  def __post_init__(self):
    fields.check(self)
    require_at_most(self, MOST_LAYERS, 'num_layers')
    require_positive(
      self, 'num_layers', 'model_dim', 'num_heads', 'num_kv_heads', 'head_dim'
    )
    require_positive(self, 'mlp_dim', 'rope_max_wavelength', 'norm_epsilon')
    require_choice(self, 'mlp', ('swiglu', 'gelu', 'gelu_erf'))
    require_choice(self, 'norm', ('rms', 'layer'))
    require_choice(self, 'norm_placement', ('pre', 'post'))
    require_choice(self, 'qk_norm', ('none', 'head', 'projection'))
    require_choice(self, 'bias', ('none', 'qkv', 'all'))
    require_choice(
      self, 'attention_implementation', ('auto', 'xla', 'pallas', 'cudnn')
    )
    require_choice(self, 'kv_cache', KV_CACHES)
    require_choice(self, 'dtype', ('float32', 'bfloat16', 'float16'))
    require(
      self.num_heads % self.num_kv_heads == 0,
      f'num_kv_heads must divide num_heads = {self.num_heads}, '
      f'got {self.num_kv_heads}.',
    )
    require(
      self.head_dim % 2 == 0, f'head_dim must be even, got {self.head_dim}.'
    )
    require(
      # None would be taken for all.
      0 < self.rope_fraction <= 1
      and self.rope_dim > 0
      and self.rope_dim % 2 == 0,
      'rope_fraction must be above 0 and up to 1, and an even number of '
      f'head_dim = {self.head_dim} coordinates; got {self.rope_fraction}.',
    )
    require(
      not (self.moe and self.bias == 'all'),
      "bias = 'all' is of MLPs, too, but moe puts experts in their place: set "
      "bias to 'qkv' or 'none', or unset moe.",
    )
    require(
      not (
        self.norm_placement == 'post'
        and self.memory
        and self.memory.replaces_mlp
      ),
      "norm_placement = 'post' is of MLPs, but memory.replaces_mlp puts memory "
      "layers in their place: set norm_placement to 'pre', or unset the other.",
    )
    require(
      not (self.moe and self.memory and self.memory.replaces_mlp),
      'moe and memory.replaces_mlp would both stand in place of the MLP; set '
      'one of them.',
    )
    require_not_negative(self, 'vocab_size', 'query_chunk', 'qk_norm_epsilon')
    require(
      min(self.init_deviations) >= 0,
      'init_deviations must be two numbers of at least 0, got '
      f'{self.init_deviations}.',
    )
    require_positive(self, 'window')
    require(
      bool(self.attention_pattern)
      and set(self.attention_pattern) <= set(ATTENTION_KINDS),
      f'attention_pattern must hold some of {", ".join(ATTENTION_KINDS)}, '
      f'got {self.attention_pattern}.',
    )
    has_sparse = 'sparse' in self.attention_pattern
    require(
      bool(self.sparse) or not has_sparse,
      "attention_pattern holds 'sparse', so sparse must be set, got "
      f'{self.attention_pattern} and None.',
    )
    require(
      has_sparse or not self.sparse,
      "sparse is set, so attention_pattern must hold 'sparse', such as "
      f"('sparse',); got {self.attention_pattern}.",
    )
    require(
      self.is_causal or not has_sparse,
      "is_causal must be True with 'sparse' in attention_pattern, whose blocks "
      f'are chosen among earlier ones; got {self.is_causal}.',
    )
    if self.dcmha:
      require(
        set(self.attention_pattern) != {'sparse'},
        'dcmha composes heads of global and local blocks, but '
        f'attention_pattern is {self.attention_pattern}: unset one.',
      )
      require(
        self.num_heads % self.dcmha.num_groups == 0,
        f'dcmha.num_groups must divide num_heads = {self.num_heads}, '
        f'got {self.dcmha.num_groups}.',
      )
    require(
      0 <= self.dropout_rate < 1,
      f'dropout_rate must be at least 0 and below 1, got {self.dropout_rate}.',
    )
    if self.memory:
      self.memory.for_width(self.model_dim)
    for placement in self.memory.placements if self.memory else ():
      require(
        placement[1] < self.num_layers,
        f'a placement must name blocks below num_layers = {self.num_layers}, '
        f'got {placement}.',
      )
    for name, layer in self.beside_mlp.items():
      known = {*layer.blocks} & {*range(self.num_layers)}
      require(
        layer.blocks == tuple(sorted(known)),
        f'{name}.blocks must be rising numbers below num_layers = '
        f'{self.num_layers}, got {layer.blocks}.',
      )
    unset = functools.partial(require_unset, self)
    pattern = f'attention_pattern = {self.attention_pattern}'
    unset('local' not in self.attention_pattern, pattern, 'window')
    is_all_sparse = set(self.attention_kinds) == {'sparse'}
    unset(is_all_sparse, pattern, 'query_chunk', 'attention_implementation')
    unset(self.qk_norm == 'none', "qk_norm = 'none'", 'qk_norm_epsilon')

  @property
  def beside_mlp(self) -> dict[str, BesideMLP]:
    """Layers of other kinds than `memory` beside MLPs, by their fields."""
    parts = {name: getattr(self, name) for name in fields.hints(type(self))}
    return {n: part for n, part in parts.items() if isinstance(part, BesideMLP)}

  @property
  def sized_memory(self) -> MemoryConfig | None:
    """The memory layers with this model's width where they name none."""
    return self.memory.for_width(self.model_dim) if self.memory else None

  @property
  def has_tables_on_file(self) -> bool:
    """Whether its value tables lie elsewhere than on the devices."""
    return self.memory is not None and self.memory.table.store != 'device'

  def with_vocabulary(self, num_tokens: int) -> 'ModelConfig':
    """The model with the tokenizer's number of tokens, if it names none."""
    size = self.vocab_size or num_tokens
    return dataclasses.replace(self, vocab_size=size)

  @property
  def rope_dim(self) -> int:
    """Coordinates of a head that are rotated."""
    return round(self.rope_fraction * self.head_dim)

  @property
  def attention_blocks(self) -> tuple[str, ...]:
    """The pattern's kind of each block, which decides its parameters."""
    pattern = self.attention_pattern
    return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

  @property
  def attention_kinds(self) -> tuple[str, ...]:
    """What each block's attention sees."""
    is_dense = self.sparse is not None and self.sparse.mode == 'dense'
    seen = dict(sparse='global') if is_dense else {}
    return tuple(seen.get(kind, kind) for kind in self.attention_blocks)

  def composition(self, layer: int) -> DCMHAConfig | None:
    """Of the heads of one block; sparse blocks have none."""
    return None if self.attention_blocks[layer] == 'sparse' else self.dcmha


def block_name(block: int) -> str:
  """Under which a block's parameters and metrics stand."""
  return f'block_{block:02}'
