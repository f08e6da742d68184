# SPDX-License-Identifier: Apache-2.0
"""The attention's part of the configuration, see `config`."""

import dataclasses
import functools

from jaxsparse.config import fields
from jaxsparse.config.errors import (
  require,
  require_choice,
  require_fraction,
  require_not_negative,
  require_positive,
  require_unset,
  shown,
)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RopeScalingConfig:
  """Lower frequencies of the rotary embedding, see `ops.attention.rope`."""

  # 'linear' divides all by the factor (arXiv:2306.15595); 'llama3' only those
  # that turn slowly, and some of them in part.
  kind: str = 'llama3'
  # By which they are divided.
  factor: float = 8.0
  # Turns within original_length: with up to so many a frequency is divided, and
  # from so many on it stays; the share moves in a straight line between.
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  # Positions that were trained on first.
  original_length: int = 8192

  def __post_init__(self):
    fields.check(self)
    require(
      self.kind in ('llama3', 'linear'),
      'rope_scaling.kind must be one of llama3, linear; got '
      f'{shown(self.kind)}.',
    )
    require(
      self.factor >= 1,
      f'rope_scaling.factor must be at least 1, got {self.factor}.',
    )
    names = 'low_frequency_factor', 'high_frequency_factor', 'original_length'
    if self.kind == 'linear':
      require_unset(self, True, "rope_scaling.kind = 'linear'", *names)
      return
    require_positive(self, *names)
    require(
      self.low_frequency_factor < self.high_frequency_factor,
      'low_frequency_factor must be below high_frequency_factor = '
      f'{self.high_frequency_factor}, got {self.low_frequency_factor}.',
    )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DCMHAConfig:
  """Dynamically composable heads, see `ops.attention.compose`."""

  # Compose scores before the softmax, and probabilities after it.
  compose_scores: bool = True
  compose_probs: bool = True
  # Factors of the queries' tokens, and of the keys', which decoding caches.
  query_wise: bool = True
  key_wise: bool = True
  # A learned matrix that is the same for all pairs, beside the identity.
  base: bool = False
  # Rank r of what a token generates.
  rank: int = 2
  # Groups G of neighbouring heads that mix among themselves: 1 for all heads,
  # the number of key/value heads to mix within each one's query heads. If the
  # mesh axis `model` divides it, that axis splits the groups.
  num_groups: int = 1
  # GELU of the generator: 'tanh', or 'erf' as in the PyTorch port.
  gelu: str = 'tanh'

  def __post_init__(self):
    fields.check(self)
    require_positive(self, 'rank', 'num_groups')
    require_choice(self, 'gelu', ('tanh', 'erf'))
    require(
      self.compose_scores or self.compose_probs,
      'compose_scores and compose_probs are both off: set one of them, or no '
      'dcmha at all.',
    )
    require(
      self.query_wise or self.key_wise or self.base,
      'query_wise, key_wise and base are all off: set one of them, or no dcmha '
      'at all.',
    )
    require_unset(
      self, not self.streams, 'query_wise and key_wise off', 'rank', 'gelu'
    )

  @property
  def places(self) -> tuple[str, ...]:
    """Where heads are composed: 'pre' and 'post', seen from the softmax."""
    is_composed = dict(pre=self.compose_scores, post=self.compose_probs)
    return tuple(place for place, is_on in is_composed.items() if is_on)

  @property
  def streams(self) -> tuple[tuple[str, str], ...]:
    """What the generator makes, in the order of the official checkpoints."""
    return tuple(
      (place, side)
      for place in self.places
      for side in ('query', 'key')
      if getattr(self, f'{side}_wise')
    )

  @property
  def num_cached(self) -> int:
    """Streams of the keys' tokens."""
    return sum(side == 'key' for _, side in self.streams)

  @property
  def num_factors(self) -> int:
    """Width of a stream for each head: reading, writing, and the gate."""
    return 2 * self.rank + 1


def query_wise_dcmha(**fields) -> DCMHAConfig:
  """Factors of the queries only: decoding caches no more than without."""
  return DCMHAConfig(**(dict(key_wise=False) | fields))


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SparseAttentionConfig:
  """A window, chosen blocks before it, and summaries of the others.

  See `block_selection` and `tile_attention` of `ops.sparse_attention`.
  """

  # 'dense' reads everything by plain attention, with the same parameters: to
  # begin training with, as the same workdir goes on with 'sparse', which has
  # the same function while it keeps all blocks. An indexer learns of all blocks
  # then, and alone by optimizer.trained='sparse/router'.
  mode: str = 'sparse'
  # Rows b of a block.
  block: int = 64
  # Rows that share a choice of blocks, a divisor of the block. Tiles of many
  # rows train fast on every backend; each row for itself chooses best.
  tile: int = 64
  # Blocks of the window before a query's own.
  window_blocks: int = 8
  # Least kept blocks, a document's first always among them, and the most that
  # can be; memory and time are for the latter. Both the same keep a fixed
  # number, as MoBA and NSA do.
  min_blocks: int = 1
  max_blocks: int = 16
  # Least and most kept blocks as a fraction of the eligible ones, the former in
  # place of min_blocks; with max_fraction = 0 the numbers alone limit them.
  min_fraction: float = 0.0
  max_fraction: float = 0.0
  # Share of importance that is covered at the start, as a logit: 4 is 98 %.
  coverage_logit: float = 4.0
  # What gives a key block its importance: 'shared', the attention's own queries
  # and the summaries, or 'indexer', projections that learn what attention reads
  # in the blocks it keeps, or in all in dense mode (`block_router`).
  router: str = 'shared'
  # Heads of the indexer and their width.
  router_heads: int = 4
  router_dim: int = 32
  # Read summaries of the blocks that are not kept. Choosing learns by it.
  use_summaries: bool = True
  # 'merged': one softmax over everything, dense attention where all is kept.
  # 'gated': a softmax for each of window, blocks and summaries (NSA).
  combine: str = 'merged'
  # Coefficient of the mean kept fraction in the loss, and over which last share
  # of the training's steps it rises from 0; with 0 it is whole from the start,
  # when what is worth keeping isn't known yet.
  sparsity_loss_weight: float = 0.0
  sparsity_loss_warmup: float = 0.0
  # Blocks that decoding keeps between the first one and the window, the others
  # are forgotten (`bounded_history`); 0 keeps all.
  history_blocks: int = 0

  def __post_init__(self):
    fields.check(self)
    require_positive(self, 'block', 'tile', 'max_blocks')
    require_positive(self, 'router_heads', 'router_dim')
    require_choice(self, 'mode', ('sparse', 'dense'))
    require_choice(self, 'router', ('shared', 'indexer'))
    require_not_negative(self, 'window_blocks', 'history_blocks')
    require_not_negative(self, 'sparsity_loss_weight')
    require_choice(self, 'combine', ('merged', 'gated'))
    require(
      self.mode == 'sparse' or not self.history_blocks,
      'history_blocks are of sparse attention, but mode is '
      f'{self.mode!r}: unset one.',
    )
    require_fraction(self, 'sparsity_loss_warmup')
    require(
      self.block % self.tile == 0,
      f'tile must divide block = {self.block}, got {self.tile}.',
    )
    require(
      0 <= self.min_blocks <= self.max_blocks,
      f'min_blocks must be 0 to max_blocks = {self.max_blocks}, '
      f'got {self.min_blocks}.',
    )
    require(
      0 <= self.min_fraction <= self.max_fraction <= 1,
      'min_fraction and max_fraction must be in order between 0 and 1, got '
      f'{self.min_fraction} and {self.max_fraction}.',
    )
    unset = functools.partial(require_unset, self)
    unset(
      self.router == 'shared',
      "router = 'shared'",
      'router_heads',
      'router_dim',
    )
    unset(
      self.sparsity_loss_weight == 0,
      'sparsity_loss_weight = 0',
      'sparsity_loss_warmup',
    )
    unset(self.max_fraction > 0, 'max_fraction above 0', 'min_blocks')

  @property
  def router_width(self) -> int:
    """Width of the router key; 0 without a router."""
    return self.router_dim if self.router == 'indexer' else 0
