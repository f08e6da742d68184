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
      product scores what one rank of all heads has.
    directions: of the pre-filter, see `tucker_top_m`; None without a core.
  """

  matrix: Any
  directions: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the parameter."""
    sides, num_ranks, width, num_heads, num_keys = self.matrix.shape
    return num_heads, sides, num_keys, width, num_ranks

  @property
  def dtype(self) -> jax.typing.DTypeLike:
    return self.matrix.dtype
