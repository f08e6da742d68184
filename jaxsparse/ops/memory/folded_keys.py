# SPDX-License-Identifier: Apache-2.0
"""A memory layer's keys as decoding reads them.

Letters: P heads, Q logical keys per axis, w key width, r ranks.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedKeys:
  """Keys as decoding reads them, in the place of the parameter.

  Attributes:
    matrix: [2, r, w, P, Q], normalised, with the gains of keys and queries: one
      product scores what one rank of all heads has. Where heads have their own
      queries, [2, r, P, Q, w].
    directions: of the pre-filter, see `tucker_top_m`; None without a core.
    is_by_head: whether it is the latter.
  """

  matrix: Any
  directions: Any = None
  is_by_head: bool = dataclasses.field(
    default=False, metadata=dict(static=True)
  )

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the parameter."""
    sides, num_ranks, width, num_heads, num_keys = self.matrix.shape
    if self.is_by_head:
      width, num_heads, num_keys = num_keys, width, num_heads
    return num_heads, sides, num_keys, width, num_ranks

  @property
  def dtype(self) -> jax.typing.DTypeLike:
    return self.matrix.dtype
