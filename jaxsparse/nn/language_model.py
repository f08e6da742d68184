# SPDX-License-Identifier: Apache-2.0
"""The language model as a plain function from tokens to logits."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Num

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.transformer import Transformer


class LanguageModel(nn.Module):
  """`Transformer`, with the same parameters, whose call gives logits alone.

  Attributes:
    config: of the model.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  config: ModelConfig
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  def __call__(
    self, tokens: Num[Array, '*S'], *args: Any, **kwargs: Any
  ) -> Float[Array, '... V']:
    """Scores of the token after each of `tokens`, in float32.

    Args:
      tokens: the last dimension is that of positions.
      *args: as `Transformer` takes them.
      **kwargs: likewise.
    """
    model = Transformer(self.config, self.axes)
    nn.share_scope(self, model)
    logits, _, _ = model(tokens, *args, **kwargs)
    return logits
