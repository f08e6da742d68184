# SPDX-License-Identifier: Apache-2.0
"""Captions token by token, by a causal text that reads its picture beside it.

The cache is a language model's, with that of the fusion's own blocks, and the
picture, which is encoded once. Behind a prefix an ordinary cache is enough.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.config import ModelConfig, MultiModalConfig
from jaxsparse.config.multimodal import fusion_stream
from jaxsparse.nn import transformer
from jaxsparse.nn.block import Cache
from jaxsparse.nn.multimodal.encoder import MultiModalEncoder


def init_cache(
  model: ModelConfig,
  settings: MultiModalConfig,
  batch_size: int,
  length: int,
  has_slots: bool = False,
) -> Cache:
  """As `transformer.init_cache`, of texts that see nothing yet.

  Beside a language model's, 'fusion', 'image' [B, L, E] and 'seen' [B, L], 0
  where nothing is to be seen.
  """
  sizes = batch_size, length, has_slots
  stream = fusion_stream(model, settings.num_fusion_layers)
  vision = settings.vision
  seen = jnp.zeros((batch_size, vision.num_patches), jnp.int32)
  image = jnp.zeros((*seen.shape, vision.stream.model_dim), vision.stream.dtype)
  return transformer.init_cache(model, *sizes) | dict(
    fusion=transformer.init_cache(stream, *sizes), image=image, seen=seen
  )


def see(
  encoder: MultiModalEncoder, images: Float[Array, 'B S S 3'], cache: Cache
) -> Cache:
  """The cache of texts that have read nothing, with their pictures."""
  image = encoder.encode_image(images)
  return cache | dict(image=image, seen=jnp.ones_like(cache['seen']))


def go_on(
  encoder: MultiModalEncoder,
  tokens: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
  cache: Cache,
  logits_at: Int[Array, 'B'] | None = None,
) -> tuple[Float[Array, 'B ... V'], Cache, dict[str, jax.Array]]:
  """Scores of the token after each, as `caption_logits` of all so far.

  Args:
    encoder: of fusion_type = 'co_attention', with a causal text.
    tokens: the new ones, as `Transformer` takes them, and as all that follows.
    positions: likewise.
    segment_ids: likewise.
    cache: what `init_cache` made and earlier calls returned.
    logits_at: likewise.

  Returns:
    Logits, the extended cache, and metrics.
  """
  of_text = {name: cache[name] for name in ('shared', 'blocks')}
  text, _, of_text, metrics = encoder.text(
    tokens, positions, segment_ids, cache=of_text
  )
  states, _, fusion = encoder.fusion(
    text,
    cache['image'],
    positions,
    segment_ids,
    cache['seen'],
    cache=cache['fusion'],
  )
  if logits_at is not None:
    at = logits_at[:, None]
    states = jnp.take_along_axis(states, at[..., None], axis=1)
    tokens, positions, segment_ids = (
      jnp.take_along_axis(x, at, axis=1)
      for x in (tokens, positions, segment_ids)
    )
  _, logits, _, _ = encoder.text(
    tokens, positions, segment_ids, has_logits=True, states=states
  )
  return logits, cache | of_text | dict(fusion=fusion), metrics
