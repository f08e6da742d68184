# SPDX-License-Identifier: Apache-2.0
"""Captions token by token, by a causal text that reads its picture beside it.

The cache is a language model's, with that of the fusion's own blocks and what
they read of the picture, which is encoded once. Behind a prefix an ordinary
cache is enough.
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

  Beside a language model's, 'fusion' and 'seen' [B, L], 0 where nothing is to
  be seen.
  """
  sizes = batch_size, length, has_slots
  seen = jnp.zeros((batch_size, settings.vision.num_patches), jnp.int32)
  stream = fusion_stream(model, settings.num_fusion_layers)
  fusion = transformer.init_cache(stream, *sizes)
  shape = (*seen.shape, model.num_kv_heads, model.head_dim)
  for block in fusion['blocks'].values():
    block['read'] = {
      name: jnp.zeros(shape, model.dtype) for name in ('key', 'value')
    }
  return transformer.init_cache(model, *sizes) | dict(fusion=fusion, seen=seen)


def see(
  encoder: MultiModalEncoder, images: Float[Array, 'B S S 3'], cache: Cache
) -> Cache:
  """The cache of texts that have read nothing, with their pictures."""
  image, seen = encoder.encode_image(images), jnp.ones_like(cache['seen'])
  # Of the text there is padding, which leaves nothing behind.
  padding = jnp.zeros((len(image), 1), jnp.int32)
  model = encoder.text_model
  text = jnp.zeros((*padding.shape, model.model_dim), model.dtype)
  _, _, fusion = encoder.fusion(
    text, image, padding, padding, seen, cache=cache['fusion']
  )
  return cache | dict(fusion=fusion, seen=seen)


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
    None,
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
