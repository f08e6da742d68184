"""The model's part of the configuration, see `config`."""

import dataclasses
import math

from jaxsparse.errors import (
  require,
  require_choice,
  require_not_negative,
  require_positive,
)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class UltraMemConfig:
  """One UltraMem layer and where its copies stand (arXiv:2411.12364)."""

  # Physical sub-keys per axis; the value table has num_keys ** 2 rows.
  num_keys: int = 128
  # Width k of the row query and of the column query.
  key_dim: int = 32
  # Retrieval heads P; all of them share one query.
  num_heads: int = 2
  # Slots m that each head reads per token.
  num_selected: int = 16
  # Width W of a row of the value table.
  value_dim: int = 64
  # Virtual blocks E of implicit value expansion, a perfect square.
  expansion: int = 4
  # Rank r of the Tucker core.
  tucker_rank: int = 2
  # Cores c; core i weights the i-th block of columns of a value.
  num_cores: int = 2
  # True: a key's width is split over the ranks, as the paper writes it. False:
  # every rank has a key of full width, as the release computes it.
  split_key_dim: bool = False
  # Taps of the causal depth-wise convolution before the query; 0 for none.
  query_conv_taps: int = 0
  # Candidates from both same-sign quadrants instead of the positive one.
  use_two_quadrants: bool = False
  # Coefficient of the loss on the lower singular values; 0 for none.
  aux_loss_weight: float = 1e-3
  # Singular values below this margin are not penalised.
  aux_loss_margin: float = 0.15
  # 'paper' (unit scores, output variance 1 / 2L) or 'release' (fixed scales).
  init: str = 'paper'
  # (read, write) pairs of 0-based blocks: the layer reads the normalised mixer
  # input of block `read`; its output is added after block `write`.
  placements: tuple[tuple[int, int], ...] = ((1, 2),)
  # Type of the value table: 'float32' or 'bfloat16'.
  value_dtype: str = 'float32'
  # How the table is split over devices: 'columns', 'rows', 'grid', or 'auto',
  # the one that sends least and leaves slices wide enough.
  scheme: str = 'auto'
  # How a dense gradient of the table is added up: 'scatter', 'sorted' (fewer
  # atomic additions where rows repeat), or 'deterministic' (to the last bit).
  table_gradient: str = 'scatter'

  @property
  def num_slots(self) -> int:
    """Slots M that are addressed."""
    return self.num_keys**2

  @property
  def table_rows(self) -> int:
    """Rows of the value table: num_slots, and in large tables some unused.

    A multiple of 64 in tables above 65,536 rows, so that up to 64 devices can
    split them evenly.
    """
    if self.num_slots <= 2**16:
      return self.num_slots
    return -(-self.num_slots // 64) * 64

  @property
  def num_logical_keys(self) -> int:
    """Logical sub-keys Q per axis."""
    return math.isqrt(self.expansion) * self.num_keys

  def __post_init__(self):
    require_positive(
      self, 'num_keys', 'key_dim', 'num_heads', 'num_selected', 'value_dim'
    )
    require_positive(self, 'expansion', 'tucker_rank', 'num_cores')
    require_choice(self, 'init', ('paper', 'release'))
    require_choice(self, 'value_dtype', ('float32', 'bfloat16'))
    require_choice(self, 'scheme', ('auto', 'columns', 'rows', 'grid'))
    require_choice(
      self, 'table_gradient', ('scatter', 'sorted', 'deterministic')
    )
    require(
      math.isqrt(self.expansion) ** 2 == self.expansion,
      f'expansion must be a perfect square, got {self.expansion}.',
    )
    require(
      self.num_selected <= self.num_logical_keys,
      f'num_selected must be at most sqrt(expansion) * num_keys = '
      f'{self.num_logical_keys}, got {self.num_selected}.',
    )
    require(
      self.value_dim % self.num_cores == 0,
      f'value_dim must be a multiple of num_cores = {self.num_cores}, '
      f'got {self.value_dim}.',
    )
    require(
      not self.split_key_dim or self.key_dim % self.tucker_rank == 0,
      f'key_dim must be a multiple of tucker_rank = {self.tucker_rank} when '
      f'split_key_dim is set, got {self.key_dim}.',
    )
    require(
      not self.use_two_quadrants or self.num_selected % 2 == 0,
      'num_selected must be even when use_two_quadrants is set, got '
      f'{self.num_selected}.',
    )
    require_not_negative(
      self, 'query_conv_taps', 'aux_loss_weight', 'aux_loss_margin'
    )
    for placement in self.placements:
      require(
        isinstance(placement, tuple) and len(placement) == 2,
        f'placements must be (read, write) pairs, got {placement!r}.',
      )
      read, write = placement
      require(
        0 <= read <= write,
        f'a placement (read, write) needs 0 <= read <= write, got {placement}.',
      )
    require(
      len({read for read, _ in self.placements}) == len(self.placements),
      f'placements must read at different blocks, got {self.placements}.',
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
  """A pre-norm decoder-only transformer."""

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
  # 'swiglu' or 'gelu'.
  mlp: str = 'swiglu'
  # Rows V of the embedding; 0 takes the tokenizer's size.
  vocab_size: int = 0
  # One table for the embedding and the output projection.
  tie_embeddings: bool = True
  # RMSNorm on queries and keys of the attention.
  use_qk_norm: bool = False
  # Longest wavelength of the rotary embedding, in positions.
  rope_max_wavelength: float = 10_000.0
  # Added to the mean square in every RMSNorm.
  norm_epsilon: float = 1e-5
  # Dropout on each mixer's output while training.
  dropout_rate: float = 0.0
  # The memory layers; None for a dense model.
  memory: UltraMemConfig | None = None
  # Type of activations: 'float32' or 'bfloat16'.
  dtype: str = 'float32'
  # Recompute each block in the backward pass instead of keeping its inside.
  use_remat: bool = False

  def __post_init__(self):
    require_positive(
      self, 'num_layers', 'model_dim', 'num_heads', 'num_kv_heads', 'head_dim'
    )
    require_positive(self, 'mlp_dim', 'rope_max_wavelength', 'norm_epsilon')
    require_choice(self, 'mlp', ('swiglu', 'gelu'))
    require_choice(self, 'dtype', ('float32', 'bfloat16'))
    require(
      self.num_heads % self.num_kv_heads == 0,
      f'num_kv_heads must divide num_heads = {self.num_heads}, '
      f'got {self.num_kv_heads}.',
    )
    require(
      self.head_dim % 2 == 0, f'head_dim must be even, got {self.head_dim}.'
    )
    require_not_negative(self, 'vocab_size')
    require(
      0 <= self.dropout_rate < 1,
      f'dropout_rate must be at least 0 and below 1, got {self.dropout_rate}.',
    )
    for placement in self.memory.placements if self.memory else ():
      require(
        placement[1] < self.num_layers,
        f'a placement must name blocks below num_layers = {self.num_layers}, '
        f'got {placement}.',
      )
