# SPDX-License-Identifier: Apache-2.0
"""Attentions that are modules of their own, by the kinds of a pattern.

`Attention` projects to heads and maps what they read back to the model width;
what lies between is the module's. 'global' and 'local' are `Attention`'s own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from jaxsparse.config import ModelConfig
from jaxsparse.nn.attention import sparse


class Kind(NamedTuple):
  """One kind of attention.

  Attributes:
    module: made by `module(config, name=kind)`; takes the input [B, T, D],
      queries [B, T, N, H], keys and values [B, T, K, H], segment_ids [B, T] and
      the cache or None, and returns what each head reads [B, T, N, H], the
      extended cache or None, and metrics.
    init_rows: a layer's own part of a decoding cache, of the config, the
      batch's size and the number of tokens.
    shared: what of a cache it shares with all layers of its kind.
    reads_unrotated: of the config and whether there is a cache, whether the
      module rotates queries and keys itself, or not at all.
  """

  module: type[nn.Module]
  init_rows: Callable[[ModelConfig, int, int], dict[str, Any]]
  shared: tuple[str, ...] = ('index',)
  reads_unrotated: Callable[[ModelConfig, bool], bool] = lambda *_: False


KINDS = {
  'sparse': Kind(
    sparse.SparseAttention,
    sparse.init_rows,
    # Its rows are where they are on the grid, and know their documents.
    ('index', 'lengths'),
    sparse.reads_unrotated,
  ),
}
