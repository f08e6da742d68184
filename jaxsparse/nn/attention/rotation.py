# SPDX-License-Identifier: Apache-2.0
"""What a model's config says of its rotary embedding, as `ops` takes it."""

import functools
from typing import Any

from jaxsparse.config import ModelConfig
from jaxsparse.ops.attention import rope


def settings(config: ModelConfig) -> dict[str, Any]:
  """Arguments of `rope.apply_rope` and `rope.rotate`."""
  return dict(
    max_wavelength=config.rope_max_wavelength,
    width=config.rope_dim,
    scaling=_scaling(config),
  )


def _scaling(config: ModelConfig) -> rope.Scaling | None:
  scaling = config.rope_scaling
  if scaling is None:
    return None
  if scaling.kind == 'linear':
    return functools.partial(rope.linear_scaling, factor=scaling.factor)
  return functools.partial(
    rope.llama3_scaling,
    factor=scaling.factor,
    low_frequency_factor=scaling.low_frequency_factor,
    high_frequency_factor=scaling.high_frequency_factor,
    original_length=scaling.original_length,
  )
