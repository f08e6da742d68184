# SPDX-License-Identifier: Apache-2.0
"""What sparse attention is given: the arrays of its tokens, and its options.

Letters as in `block_selection`; T queries, S keys.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.quantized_rows import QuantizedRows
from jaxsparse.ops.sparse_attention.block_router import Router, no_router


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseOptions:
  """Sizes of the blocks, bounds of the choice, and what is read."""

  # Rows b of a block.
  block: int
  # Rows r of a tile, a divisor of b.
  tile: int
  # Blocks of the window before a query's own.
  window_blocks: int
  # Slots k, the most blocks that can be kept, and the least that are.
  max_blocks: int
  min_blocks: int = 1
  # Eligible blocks of a document, from its beginning, that are always kept.
  sinks: int = 1
  # Least and most kept blocks as fractions of the eligible ones, if the latter
  # is set.
  min_fraction: float = 0.0
  max_fraction: float = 0.0
  # Width of the step at the covered share, for its gradient.
  temperature: float = 0.1
  # Read summaries of the other blocks, and do not only choose by them.
  use_summaries: bool = True
  # 'merged' or 'gated', see `tile_attention`.
  combine: str = 'merged'
  # Queries at once, at least, where there are many.
  chunk: int = 512

  @property
  def is_overlapping(self) -> bool:
    """All complete blocks are eligible, also those of the window."""
    return self.combine == 'gated'


class SparseInputs(NamedTuple):
  """Arrays of all tokens."""

  # Head n of the queries reads key/value head n // (N / K).
  query: Float[Array, 'B T N H']
  # Of a cache also `QuantizedRows`, as are values.
  key: Float[Array, 'B S K H'] | QuantizedRows
  value: Float[Array, 'B S K H'] | QuantizedRows
  # Document of each query; 0 for padding.
  segments: Int[Array, 'B T']
  # Share of importance that is to be covered; that of the first row of each
  # tile counts.
  coverage: Float[Array, 'B T K']
  # Factors of the window, the kept blocks and the summaries; None for 1.
  gates: Float[Array, 'B T N 3'] | None = None
  # Chooses the blocks; without one, or by one of width 0, the queries and the
  # summaries do.
  router: Router | None = None

  def completed(self) -> 'SparseInputs':
    """With gates of 1 and a router of width 0 for those that are None."""
    batch, length, num_heads, _ = self.query.shape
    gates, router = self.gates, self.router
    if gates is None:
      gates = jnp.ones((batch, length, num_heads, 3), self.query.dtype)
    if router is None:
      router = no_router(batch, length, self.key.shape[1])
    return self._replace(gates=gates, router=router)
