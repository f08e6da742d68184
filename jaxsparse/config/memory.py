# SPDX-License-Identifier: Apache-2.0
"""One configuration for the whole family of memory layers, and its presets.

A memory layer scores a grid of row keys x column keys, keeps the best cells of
each head, reads their rows of a value table and pools them. PKM, PEER, Memory+,
UltraMem and UltraMemV2 differ in how each of these steps is done; every step is
a field of `MemoryConfig`, so that one can walk from one member to another. The
fields' defaults are UltraMem's; `MemoryConfig.pkm()`, `.peer()`,
`.memory_plus()` and `.ultramem_v2()` are the others. Each works as it is, in a
model of any width.
"""

import dataclasses
import functools
import math
from typing import Any

from jaxsparse.config import fields
from jaxsparse.config.errors import (
  require,
  require_at_most,
  require_choice,
  require_not_negative,
  require_positive,
  require_unset,
)
from jaxsparse.config.tables import TableConfig

# Rows are addressed by int32, and pairs of logical keys by uint32.
MOST_KEYS = math.isqrt(2**31 - 1)
MOST_LOGICAL_KEYS = 2**16


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MemoryConfig:
  """One memory layer and where its copies stand (arXiv:2411.12364)."""

  # Physical sub-keys per axis; the layer addresses num_keys ** 2 slots.
  num_keys: int = 128
  # Width k of the row query and of the column query.
  key_dim: int = 32
  # Retrieval heads P.
  num_heads: int = 2
  # Slots m that each head reads per token.
  num_selected: int = 16
  # Width W of a row of the value table; 0 for the model's.
  value_dim: int = 64
  # Virtual blocks E of implicit value expansion, a perfect square.
  expansion: int = 4
  # What a cell of the grid scores: 'tucker', row and column scores of several
  # ranks bound by a small core, or 'additive', their sum (product keys).
  grid: str = 'tucker'
  # Rank r of the Tucker core.
  tucker_rank: int = 2
  # Cores c; core i weights the i-th block of columns of a value.
  num_cores: int = 2
  # A core of its own for each of the E pairings of a row and a column key set,
  # as the UltraMemV2 paper writes it; otherwise one for all.
  cores_per_pairing: bool = False
  # True: a key's width is split over the ranks, as the paper writes it. False:
  # every rank has a key of full width, as the release computes it.
  split_key_dim: bool = False
  # Queries of an axis: 'shared' by all heads and ranks, 'per_head', or
  # 'per_rank'.
  query: str = 'shared'
  # One set of sub-keys for all heads, as in PEER.
  share_keys: bool = False
  # Add a bias to the query.
  query_bias: bool = False
  # Norm of queries and of keys: 'rms', 'layer' or 'none'.
  query_norm: str = 'rms'
  key_norm: str = 'rms'
  # What makes a weight of a kept score: 'identity', 'softmax' over a head's
  # kept scores, 'sigmoid' or 'relu'.
  score_activation: str = 'identity'
  # Scatter addresses by a table that is among the parameters, as layers of
  # others need; otherwise by a hash.
  stored_addresses: bool = False
  # Taps of the causal depth-wise convolution before the query; 0 for none.
  query_conv_taps: int = 0
  # Candidates from both same-sign quadrants instead of the positive one.
  use_two_quadrants: bool = False
  # Width of a row of the pre-value table, whose product with a projection of
  # the input scales a slot's weight; 0 for none, or without pre_value_map for
  # the model's width.
  pre_value_dim: int = 0
  # Activation of that product: 'identity', 'gelu' or 'relu'.
  pre_value_activation: str = 'identity'
  # Project the input to pre_value_dim; without it the input itself meets the
  # rows, which are as wide as the model (PEER).
  pre_value_map: bool = True
  # Pool the values of each virtual block apart, with an output map for each;
  # otherwise all together, and blocks are but more addresses (UltraMemV2).
  pool_by_block: bool = True
  # Map the pooled values to the model's width; without it value_dim must be 0,
  # or that width.
  output_map: bool = True
  # Scale the pooled values by the SiLU of a projection of the input.
  gate: bool = False
  # Rows of one table that all placements share; 0 gives each its own. The i-th
  # of L placements sees num_keys ** 2 rows of it, from i * shared_rows / L on
  # and around the end.
  shared_rows: int = 0
  # The memory stands in place of the block's MLP instead of beside it.
  replaces_mlp: bool = False
  # Coefficient of the loss on the lower singular values; 0 for none.
  aux_loss_weight: float = 1e-3
  # Singular values below this margin are not penalised.
  aux_loss_margin: float = 0.15
  # Initial scales: 'paper' (UltraMem: unit scores, output variance 1 / 2L),
  # 'release' (fixed, those of the UltraMem and UltraMemV2 code), 'matched'
  # (UltraMemV2: the output's variance is that of the MLP), or 'product_keys'
  # (PKM and its heirs).
  init: str = 'paper'
  # (read, write) pairs of 0-based blocks: the layer reads what the
  # MLP of block `read` reads; its output is added after block `write`.
  placements: tuple[tuple[int, int], ...] = ((1, 2),)
  # The tables: how they are stored, split and trained.
  table: TableConfig = dataclasses.field(default_factory=TableConfig)

  @classmethod
  def ultramem(cls, **fields: Any) -> 'MemoryConfig':
    """UltraMem (arXiv:2411.12364): the defaults."""
    return cls(**fields)

  @classmethod
  def pkm(cls, **fields: Any) -> 'MemoryConfig':
    """Product-key memory (Lample et al. 2019, arXiv:1907.05242).

    The query's batch norm of the original is an RMSNorm here, as in all its
    heirs: batch statistics look at other positions.
    """
    own = dict(value_dim=0, output_map=False)
    return cls(**(_PRODUCT_KEYS | own | fields))

  @classmethod
  def peer(cls, **fields: Any) -> 'MemoryConfig':
    """PEER: one-neuron experts, a million in the paper (arXiv:2407.04153)."""
    own = dict(
      share_keys=True,
      value_dim=0,
      output_map=False,
      pre_value_map=False,
      pre_value_activation='gelu',
      replaces_mlp=True,
    )
    return cls(**(_PRODUCT_KEYS | own | fields))

  @classmethod
  def memory_plus(cls, **fields: Any) -> 'MemoryConfig':
    """Memory+ (arXiv:2412.09764): one table for all layers, gated, qk-norm.

    The released port to ByteDance's code stands beside the MLP
    (replaces_mlp=False), has no query bias, and overwrites its normalised keys
    with the raw ones (key_norm='none').
    """
    own = dict(value_dim=0, gate=True, key_norm='rms', replaces_mlp=True)
    config = cls(**(_PRODUCT_KEYS | own | fields))
    if 'shared_rows' not in fields:
      config.shared_rows = config.num_slots
    return config

  @classmethod
  def ultramem_v2(cls, **fields: Any) -> 'MemoryConfig':
    """UltraMemV2 (arXiv:2508.18756): pre-values, windows of one shared table.

    In a model give every block a placement (i, i), and set `shared_rows`; alone
    the layer has a table of its own. As in the release the pairings of key sets
    share one core; the paper has cores_per_pairing=True. The release computes
    with query='shared' though its weights are for more.
    """
    own = dict(
      num_heads=1,
      query='per_rank',
      pre_value_dim=64,
      pool_by_block=False,
      init='matched',
      aux_loss_weight=0.0,
      placements=((1, 1),),
    )
    return cls(**(own | fields))

  @property
  def num_slots(self) -> int:
    """Slots M that one layer addresses."""
    return self.num_keys**2

  @property
  def table_rows(self) -> int:
    """Rows of a table: those in use, and in large tables some unused.

    A multiple of 64 in tables above 1,024 rows, so that up to 64 devices can
    split them evenly.
    """
    rows = self.shared_rows or self.num_slots
    return rows if rows <= 2**10 else -(-rows // 64) * 64

  @property
  def num_tables(self) -> int:
    """Value tables of the model, which has as many pre-value tables or none."""
    return 1 if self.shared_rows else len(self.placements)

  @property
  def num_logical_keys(self) -> int:
    """Logical sub-keys Q per axis."""
    return math.isqrt(self.expansion) * self.num_keys

  @property
  def num_pools(self) -> int:
    """Pools of values per token."""
    return self.expansion if self.pool_by_block else 1

  @property
  def num_ranks(self) -> int:
    """Rank scores r of one key."""
    return self.tucker_rank if self.grid == 'tucker' else 1

  @property
  def num_weights(self) -> int:
    """Weights c of one kept cell."""
    return self.num_cores if self.grid == 'tucker' else 1

  @property
  def has_pre_values(self) -> bool:
    """Whether a slot has a row of a pre-value table, too."""
    return self.pre_value_dim > 0 or not self.pre_value_map

  def for_width(self, model_dim: int) -> 'MemoryConfig':
    """The layer in a model of width D, which takes the place of widths of 0.

    Raises:
      UserError: a width that must be the model's is not, or D is no multiple of
        the number of cores.
    """
    widths = {}
    if self.value_dim == 0:
      widths['value_dim'] = model_dim
    if self.pre_value_dim == 0 and self.has_pre_values:
      widths['pre_value_dim'] = model_dim
    sized = dataclasses.replace(self, **widths) if widths else self
    require(
      sized.output_map or sized.value_dim == model_dim,
      f'value_dim must be 0 or the model width {model_dim} without output_map, '
      f'as MemoryConfig.pkm() has it, got {sized.value_dim}.',
    )
    require(
      sized.pre_value_map or sized.pre_value_dim == model_dim,
      f'pre_value_dim must be 0 or the model width {model_dim} without '
      f'pre_value_map, as MemoryConfig.peer() has it, got '
      f'{sized.pre_value_dim}.',
    )
    return sized

  def __post_init__(self):
    fields.check(self)
    require_positive(self, 'num_keys', 'key_dim', 'num_heads', 'num_selected')
    require_positive(self, 'expansion', 'tucker_rank', 'num_cores')
    for name, choices in _CHOICES.items():
      require_choice(self, name, choices)
    require(
      math.isqrt(self.expansion) ** 2 == self.expansion,
      f'expansion must be a perfect square, got {self.expansion}.',
    )
    require_at_most(self, MOST_KEYS, 'num_keys')
    require(
      self.num_logical_keys <= MOST_LOGICAL_KEYS,
      'sqrt(expansion) * num_keys, the logical sub-keys of an axis, must be at '
      f'most {MOST_LOGICAL_KEYS:,}, got {self.num_logical_keys:,}.',
    )
    require(
      self.num_selected <= self.num_logical_keys,
      f'num_selected must be at most sqrt(expansion) * num_keys = '
      f'{self.num_logical_keys}, got {self.num_selected}.',
    )
    require(
      self.value_dim % self.num_weights == 0,
      f'value_dim must be a multiple of num_cores = {self.num_cores}, '
      f'got {self.value_dim}.',
    )
    require(
      not self.split_key_dim or self.key_dim % self.num_ranks == 0,
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
    require_not_negative(self, 'value_dim', 'pre_value_dim', 'shared_rows')
    self._check_combinations()
    self._check_placements()
    self._check_use()

  def _check_combinations(self):
    for name in ('use_two_quadrants', 'cores_per_pairing', 'split_key_dim'):
      require(
        self.grid == 'tucker' or not getattr(self, name),
        f"{name} needs grid = 'tucker', got grid = {self.grid!r}.",
      )
    require(
      self.grid == 'tucker' or self.query != 'per_rank',
      "query = 'per_rank' needs grid = 'tucker', which has ranks, got grid = "
      f'{self.grid!r}.',
    )
    require(
      not (self.split_key_dim and self.query == 'per_rank'),
      "split_key_dim needs a query that is not 'per_rank', which gives every "
      'rank a query of full width.',
    )
    require(
      not self.share_keys or self.query == 'per_head',
      "share_keys needs query = 'per_head', a query for each head, as "
      f'MemoryConfig.peer() has it, got {self.query!r}.',
    )
    require(
      not self.gate or self.output_map,
      'gate needs output_map, which maps the gated values, as '
      'MemoryConfig.memory_plus() has it.',
    )
    require(
      self.shared_rows == 0 or self.shared_rows >= self.num_slots,
      f'shared_rows must be 0 or at least num_keys ** 2 = {self.num_slots}, '
      f'got {self.shared_rows}.',
    )
    require(
      self.init != 'matched' or self.has_pre_values,
      "init = 'matched' is UltraMemV2's rule and needs pre_value_dim above 0: "
      'MemoryConfig.ultramem_v2() has both.',
    )
    if self.stored_addresses:
      # As whole numbers of float32, the type of all parameters.
      require_at_most(self, 2**12, 'num_logical_keys')

  def _check_use(self):
    """Refuses what would do nothing."""
    unset = functools.partial(require_unset, self)
    unset(self.grid == 'additive', "grid = 'additive'", 'tucker_rank')
    unset(self.grid == 'additive', "grid = 'additive'", 'num_cores')
    one_rank = f'one rank of scores (grid = {self.grid!r})'
    unset(self.num_ranks == 1, one_rank, 'aux_loss_weight', 'aux_loss_margin')
    unset(self.aux_loss_weight == 0, 'aux_loss_weight = 0', 'aux_loss_margin')
    unset(self.expansion == 1, 'expansion = 1', 'cores_per_pairing')
    unset(self.num_ranks == 1, one_rank, 'split_key_dim')
    unset(not self.has_pre_values, 'pre_value_dim = 0', 'pre_value_activation')

  def _check_placements(self):
    require(
      bool(self.placements),
      'placements must name a (read, write) pair of blocks at least; a model '
      'without memory layers has memory=None.',
    )
    for placement in self.placements:
      read, write = placement
      require(
        0 <= read <= write,
        f'a placement (read, write) needs 0 <= read <= write, got {placement}.',
      )
      require(
        read == write or not self.replaces_mlp,
        'replaces_mlp needs placements that write where they read, got '
        f'{placement}.',
      )
    require(
      len({read for read, _ in self.placements}) == len(self.placements),
      f'placements must read at different blocks, got {self.placements}.',
    )


_NORMS = ('rms', 'layer', 'none')
_CHOICES = dict(
  grid=('tucker', 'additive'),
  query=('shared', 'per_head', 'per_rank'),
  query_norm=_NORMS,
  key_norm=_NORMS,
  score_activation=('identity', 'softmax', 'sigmoid', 'relu'),
  pre_value_activation=('identity', 'gelu', 'relu'),
  init=('paper', 'release', 'matched', 'product_keys'),
)

# What PKM, PEER and Memory+ have in common.
_PRODUCT_KEYS = dict(
  grid='additive',
  expansion=1,
  query='per_head',
  query_bias=True,
  key_norm='none',
  score_activation='softmax',
  num_heads=4,
  num_selected=32,
  aux_loss_weight=0.0,
  init='product_keys',
  placements=((1, 1),),
)
