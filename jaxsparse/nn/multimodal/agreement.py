# SPDX-License-Identifier: Apache-2.0
"""What an encoder is made of, and what its two sides must agree in."""

import dataclasses
from typing import Any

import jax

from jaxsparse.config import ModelConfig, MultiModalConfig, VisionConfig
from jaxsparse.config.errors import require, shown
from jaxsparse.config.multimodal import encoder_stream

TEXT_DIM, IMAGE_DIM, FUSION_TYPE = 1024, 768, 'co_attention'

# Of an encoder that is made of two widths alone.
_LAYERS, _VOCABULARY = 4, 32_000


def settings_of(
  config: MultiModalConfig | None, image_dim: int, fusion_type: str
) -> MultiModalConfig:
  """The config, or that of a width and a kind of fusion.

  Raises:
    UserError: it is none, or a width or kind is given that it has not.
  """
  if config is None:
    stream = encoder_stream(image_dim, _LAYERS)
    return MultiModalConfig(
      vision=VisionConfig(stream=stream), fusion_type=fusion_type
    )
  _require_kind('config', config, MultiModalConfig)
  width = config.vision.stream.model_dim
  _agree('image_dim', image_dim, IMAGE_DIM, 'config', width)
  _agree('fusion_type', fusion_type, FUSION_TYPE, 'config', config.fusion_type)
  return config


def text_model_of(
  model: ModelConfig | None, text_dim: int, settings: MultiModalConfig
) -> ModelConfig:
  """The model of the text's stream, or that of a width.

  Raises:
    UserError: it is none, or a width is given that it has not.
  """
  if model is None:
    return dataclasses.replace(
      encoder_stream(text_dim, _LAYERS),
      vocab_size=_VOCABULARY,
      is_causal=settings.fusion_type == 'prefix',
    )
  _require_kind('model', model, ModelConfig)
  _agree('text_dim', text_dim, TEXT_DIM, 'model', model.model_dim)
  return model


def require_states(
  settings: MultiModalConfig,
  model: ModelConfig,
  text: jax.Array,
  image: jax.Array,
) -> None:
  """Refuses states of other widths, or of texts and pictures of two batches.

  Raises:
    UserError: they are such.
  """
  width = settings.vision.stream.model_dim
  is_tokens = settings.fusion_type == 'prefix' and text.ndim == 2
  is_text = is_tokens or text.shape[2:] == (model.model_dim,)
  require(
    is_text and image.shape[2:] == (width,) and len(text) == len(image),
    f'text and image must be [B, T, {model.model_dim}] and [B, L, {width}] of '
    f'as many items, got {list(text.shape)} and {list(image.shape)}.',
  )


def _require_kind(name: str, value: Any, kind: type) -> None:
  require(
    isinstance(value, kind),
    f'{name} must be a {kind.__name__}, got {shown(value)}.',
  )


def _agree(name: str, given: Any, default: Any, of: str, found: Any) -> None:
  require(
    given in (default, found),
    f'{name} = {given!r} is not that of {of}, {found!r}: leave it out, or '
    f'change {of}.',
  )
