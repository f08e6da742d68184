# SPDX-License-Identifier: Apache-2.0
"""Text and pictures, or frames, as states, as vectors and fused."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import ModelConfig, MultiModalConfig
from jaxsparse.config.errors import require
from jaxsparse.config.multimodal import check_streams
from jaxsparse.nn.block import merged, prefixed
from jaxsparse.nn.multimodal.agreement import (
  FUSION_TYPE,
  IMAGE_DIM,
  TEXT_DIM,
  require_states,
  settings_of,
  text_model_of,
)
from jaxsparse.nn.multimodal.cross_attention import Pool, normalised
from jaxsparse.nn.multimodal.frame_router import FrameRouter
from jaxsparse.nn.multimodal.fusion import (
  CoAttentionFusion,
  ConcatFusion,
  Linear,
)
from jaxsparse.nn.multimodal.masks import (
  Mask,
  only_there,
  positions_of,
  segments_of,
)
from jaxsparse.nn.multimodal.patch_encoder import PatchEncoder
from jaxsparse.nn.multimodal.pictures import patches_of
from jaxsparse.nn.multimodal.text_tower import TextTower, behind_prefix
from jaxsparse.ops.patches import reshaped

# At the start: the temperature's logarithm, and SigLIP's bias.
_TEMPERATURE = dict(siglip=math.log(10), infonce=math.log(1 / 0.07))
_BIAS = -10.0


class MultiModalEncoder(nn.Module):
  """A text tower, a picture tower, and what fuses both.

  `MultiModalEncoder(text_dim=1024, image_dim=768)` has four blocks in each
  tower; `config` and `model` say all. Its methods are called by
  `module.apply(variables, ..., method='encode_text')`; `init` by a call of the
  module makes all parameters: `text` has those of a `Transformer`, `image`
  those of a `PatchEncoder`.

  Two towers compare n texts with m pictures by n + m passes and a product.
  Fusing is a pass for each pair: rank by the towers, and fuse the best few.

  Attributes:
    text_dim: width of the text's stream, without `model`.
    image_dim: width of the picture's stream, without `config`.
    fusion_type: without `config`, see `MultiModalConfig`.
    config: of pictures, fusion and objectives; None for that of the widths.
    model: of the text's stream; None for that of the width.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  text_dim: int = TEXT_DIM
  image_dim: int = IMAGE_DIM
  fusion_type: str = FUSION_TYPE
  config: MultiModalConfig | None = None
  model: ModelConfig | None = None
  axes: mesh.Axes = mesh.DEFAULT_AXES

  def setup(self) -> None:
    settings, model = self.settings, self.text_model
    check_streams(model, settings)
    axes, vision = self.axes, settings.vision
    width = settings.fused_dim
    self.text = TextTower(model, axes)
    self.image = PatchEncoder(vision, axes)
    self.text_pool = Pool('mean', model, axes)
    self.image_pool = Pool(vision.pooling, vision.stream, axes)
    self.text_map = Linear(width, dtype='float32', axes=axes)
    self.image_map = Linear(width, dtype='float32', axes=axes)
    start = _TEMPERATURE[settings.contrastive]
    self.log_temperature = self.param(
      'log_temperature', nn.initializers.constant(start), ()
    )
    if settings.contrastive == 'siglip':
      self.logit_bias = self.param(
        'logit_bias', nn.initializers.constant(_BIAS), ()
      )
    if settings.num_frames > 1:
      self.frame_router = FrameRouter(settings, model, axes)
    num_layers = settings.num_fusion_layers
    if settings.fusion_type == 'co_attention':
      self.fusion = CoAttentionFusion(model, vision.stream, num_layers, axes)
      self.fused_image_pool = Pool(vision.pooling, vision.stream, axes)
      self.fused_image_map = Linear(width, dtype='float32', axes=axes)
    elif settings.fusion_type == 'concat':
      self.fusion = ConcatFusion(model, num_layers, axes)
    elif settings.fusion_type == 'prefix':
      # As large as the tokens' embeddings.
      scale = model.model_dim**-0.5
      self.connector = Linear(model.model_dim, scale, model.dtype, axes)
    if settings.fusion_type != 'late':
      self.fused_map = Linear(width, dtype='float32', axes=axes)
    if settings.matching_weight:
      self.match = Linear(1, dtype='float32', axes=axes)

  @property
  def settings(self) -> MultiModalConfig:
    """Of pictures, fusion and objectives."""
    return settings_of(self.config, self.image_dim, self.fusion_type)

  @property
  def text_model(self) -> ModelConfig:
    """Of the text's stream."""
    return text_model_of(self.model, self.text_dim, self.settings)

  def encode_text(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B T D']:
    """States of the text's tokens, normalised: those of the language model.

    Args:
      tokens: of a text a row, or of several, packed.
      segment_ids: text of each token; 0 for padding.
      positions: of each in its text, by default that in its row, padding left
        out.
    """
    if positions is None and segment_ids is not None:
      positions = positions_of(jnp.asarray(segment_ids))
    return self.text(tokens, positions, segment_ids)[0]

  def encode_image(
    self,
    images: Float[Array, 'B ...'],
    mask: Mask | None = None,
    at: Int[Array, 'B L 2'] | None = None,
  ) -> Float[Array, 'B L E']:
    """States of the patches, normalised.

    Args:
      images: pictures [B, S, S, 3] with numbers in [-1, 1], frames
        [B, F, S, S, 3], whose patches come one after another, or patches
        [B, L, 3 P^2] with their places.
      mask: what is there: of pictures and frames [B], [B, F] or patches
        [B, L], [B, F, L]; of patches the number of their picture in the row,
        from 1 on, and 0 for padding.
      at: row and column of each patch, of what is no picture of image_size.

    Raises:
      UserError: they are of another size, or as many frames, than config has.
    """
    return self._encode_image(images, mask, at)[0]

  def embed_text(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
  ) -> Float[Array, 'B E']:
    """A vector of length 1 for each row, to be compared with pictures'."""
    text = self.encode_text(tokens, segment_ids)
    return self.text_vector(text, segments_of(segment_ids, text))

  def embed_image(
    self, images: Float[Array, 'B ...'], mask: Mask | None = None
  ) -> Float[Array, 'B E']:
    """A vector of length 1 for each row; 0 where no patch is there."""
    image, segments, _ = self._encode_image(images, mask)
    return self._image_vector(image, segments)

  def fuse(
    self,
    text: Num[Array, 'B T ...'],
    image: Float[Array, 'B L E'],
    text_mask: Mask | None = None,
    image_mask: Mask | None = None,
  ) -> Float[Array, 'B D']:
    """One vector [B, fused_dim] of a text and a picture, in f32.

    The product of both streams' vectors (ViLBERT) behind co-attention, and of
    length-1 vectors with 'late', whose sum is their similarity; the mean of all
    states with 'concat', and of the text's behind a 'prefix'.

    Args:
      text: what `encode_text` gives; with 'prefix' the tokens themselves, or
        anything that stands in place of their embeddings.
      image: what `encode_image` gives.
      text_mask: [B, T], False or 0 for padding.
      image_mask: of patches [B, L], or of frames [B, F].
    """
    segments = self._frames_of(image_mask, image)
    return self._fuse(text, image, segments_of(text_mask, text), segments)[0]

  def image_inputs(self, image: Float[Array, 'B L E']) -> Float[Array, 'B L D']:
    """What a language model behind a picture has for its tokens' embeddings.

    Of fusion_type = 'prefix': `inputs` of a `Transformer` with the parameters
    `text`, whose first tokens the patches are.
    """
    kind = self.settings.fusion_type
    require(kind == 'prefix', f"fusion_type must be 'prefix', got {kind!r}.")
    return self.connector(image)[0]

  def caption_logits(
    self,
    tokens: Int[Array, 'B T'],
    image: Float[Array, 'B L E'],
    segment_ids: Int[Array, 'B T'] | None = None,
    image_mask: Mask | None = None,
  ) -> Float[Array, 'B T V']:
    """Scores of the token after each, with the picture in sight, in float32.

    Of fusion_type = 'prefix', or of 'co_attention' with a causal text.
    """
    kind, is_causal = self.settings.fusion_type, self.text_model.is_causal
    require(
      is_causal and kind in ('prefix', 'co_attention'),
      "caption_logits need fusion_type = 'prefix' or 'co_attention', and a "
      f'causal text; got {kind!r} and is_causal = {is_causal}.',
    )
    segments = segments_of(segment_ids, tokens)
    text = tokens
    if kind != 'prefix':
      text = self.encode_text(tokens, segment_ids)
    seen = self._frames_of(image_mask, image)
    _, states, _ = self._fuse(text, image, segments, seen)
    return self._logits(tokens, segments, states)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    images: Float[Array, 'B ...'],
    segment_ids: Int[Array, 'B T'] | None = None,
    image_mask: Mask | None = None,
    deterministic: bool = True,
    asking: Mask | None = None,
  ) -> dict[str, Any]:
    """All that objectives need, of B texts and their pictures.

    Args:
      tokens: of one text a row.
      images: as `encode_image` takes them.
      segment_ids: 0 for padding.
      image_mask: as `encode_image` takes it.
      deterministic: False for dropout, which needs the rng 'dropout'.
      asking: tokens by which frames are chosen [B, T], by default all: of a
        caption that is learned those before it.

    Returns:
      'text_embedding' and 'image_embedding' [B, fused_dim], of length 1, in
      f32; 'log_temperature', and of SigLIP 'logit_bias'; 'text' and 'image',
      the states; 'fused' [B, fused_dim]; with matching_weight 'match' [B], the
      logit of a pair; with caption_weight 'logits' [B, T, V]; with frames
      'shares' [B, F]; and 'metrics', scalars such as 'text/block_00/...' and
      'frames/share_read', with the sum 'aux_loss'.
    """
    settings = self.settings
    segments = segments_of(segment_ids, tokens)
    text, _, _, of_text = self.text(
      tokens, positions_of(segments), segments, deterministic=deterministic
    )
    image, seen, of_image = self._encode_image(
      images, image_mask, deterministic=deterministic
    )
    metrics = merged(prefixed('text', of_text), prefixed('image', of_image))
    read = tokens if settings.fusion_type == 'prefix' else text
    fused, states, others = self._fuse(
      read, image, segments, seen, deterministic, asking
    )
    found = dict(
      text=text,
      image=image,
      text_embedding=self.text_vector(text, segments),
      image_embedding=self._image_vector(image, seen),
      log_temperature=self.log_temperature,
      fused=fused,
    )
    if settings.contrastive == 'siglip':
      found['logit_bias'] = self.logit_bias
    if settings.matching_weight:
      found['match'] = self.match_logit(fused)
    if settings.caption_weight:
      found['logits'] = self._logits(tokens, segments, states)
    if 'shares' in others:
      found['shares'] = others.pop('shares')
    return found | dict(metrics=merged(metrics, others))

  def match_logit(self, fused: Float[Array, 'B D']) -> Float[Array, 'B']:
    """Whether text and picture are a pair, of what both are fused to."""
    weight = self.settings.matching_weight
    require(weight > 0, f'match_logit needs matching_weight > 0, got {weight}.')
    (logit,) = self.match(fused[:, None])
    return logit[:, 0, 0]

  def text_vector(
    self, text: Float[Array, 'B T D'], segments: Int[Array, 'B T']
  ) -> Float[Array, 'B E']:
    """`embed_text` of what `encode_text` gave."""
    (pooled,) = self.text_pool(text, segments)
    return normalised(self.text_map(pooled)[0][:, 0])

  def _image_vector(self, image, segments):
    (pooled,) = self.image_pool(image, segments)
    return normalised(self.image_map(pooled)[0][:, 0])

  def _encode_image(self, images, mask, at=None, deterministic=True):
    """States [B, L, E], whether each patch is there, and metrics."""
    patches = patches_of(images, at, self.settings)
    shape = patches.shape[:-1]
    segments = segments_of(mask, patches, shape)
    states, metrics = self.image(patches, at, segments, deterministic)
    length = math.prod(shape[1:])
    seen = (segments > 0).astype(jnp.int32)
    return (
      reshaped(states, 1, (length, states.shape[-1])),
      reshaped(seen, 1, (length,)),
      metrics,
    )

  def _frames_of(self, mask, image):
    """Whether each patch of what `encode_image` gave is there [B, L]."""
    batch, length = image.shape[:2]
    num_frames = self.settings.num_frames
    shape = (batch, length)
    if mask is not None and mask.shape[1:] != (length,) and num_frames > 1:
      shape = (batch, num_frames, length // num_frames)
    return reshaped(segments_of(mask, image, shape), 1, (length,))

  def _fuse(
    self, text, image, text_segments, seen, deterministic=True, asking=None
  ):
    """What both are fused to, states of the text, metrics and shares."""
    settings, others, gate = self.settings, {}, None
    kind = settings.fusion_type
    text_segments = (text_segments > 0).astype(jnp.int32)
    require_states(settings, self.text_model, text, image)
    image = only_there(image, seen)
    if text.ndim == 3:
      text = only_there(text, text_segments)
    if settings.num_frames > 1:
      question = ()
      if settings.frame_choice == 'routed':
        asked = text_segments
        if asking is not None:
          asked *= segments_of(asking, asked)
        question = text, asked
      image, seen, gate, shares, counts = self.frame_router(
        image, seen, *question
      )
      num_read, num_there = counts.sum(0)
      others = {
        'frames/share_read': num_read / jnp.maximum(num_there, 1),
        'shares': shares,
      }
    if kind == 'late':
      image = image if gate is None else image * gate[..., None]
      vectors = (
        self.text_vector(text, text_segments),
        self._image_vector(image, seen),
      )
      return vectors[0] * vectors[1], text, others
    if kind == 'prefix':
      states, metrics = self._behind_prefix(
        text, image, text_segments, seen, deterministic
      )
      others |= prefixed('prefix', metrics)
      segments = text_segments
    elif kind == 'concat':
      states, segments = self.fusion(text, image, text_segments, seen)
    else:
      states, image, _ = self.fusion(
        text, image, positions_of(text_segments), text_segments, seen, gate
      )
      segments = text_segments
    (pooled,) = self.text_pool(states, segments)
    fused = self.fused_map(pooled)[0][:, 0]
    if kind == 'co_attention':
      (pooled,) = self.fused_image_pool(image, seen)
      fused *= self.fused_image_map(pooled)[0][:, 0]
    return fused, states, others

  def _behind_prefix(self, text, image, text_segments, seen, deterministic):
    """States of the text, read by the language model behind the picture."""
    (inputs,) = self.connector(image)
    rows = behind_prefix(text, inputs, text_segments, seen)
    states, _, _, metrics = self.text(**rows, deterministic=deterministic)
    return states[:, image.shape[1] :], metrics

  def _logits(self, tokens, segments, states):
    _, logits, _, _ = self.text(
      tokens, None, segments, has_logits=True, states=states
    )
    return logits
