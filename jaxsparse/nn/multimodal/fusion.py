# SPDX-License-Identifier: Apache-2.0
"""The layers in which text and picture meet, by the kind of fusion."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.multimodal import fusion_stream
from jaxsparse.nn.block import Cache
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import weight
from jaxsparse.nn.multimodal.co_attention import CoAttention
from jaxsparse.nn.multimodal.cross_attention import norm
from jaxsparse.nn.stream import begun, block_cache, run_blocks, with_block
from jaxsparse.ops.token_product import token_product


class Linear(nn.Module):
  """A map of each position to another width, the leaf `map` [D, E].

  Attributes:
    width: E.
    scale: standard deviation of what it makes of inputs of variance 1, at the
      start.
    dtype: of the output; None for that of the input.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  width: int
  scale: float = 1.0
  dtype: str | None = None
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(returns=('tokens',), mixes_positions=lambda layer: False)
  def __call__(self, x: Float[Array, 'B T D']) -> tuple[Float[Array, 'B T E']]:
    dtype = self.dtype or x.dtype
    variance = self.scale**2 / x.shape[-1]
    shape = (x.shape[-1], self.width)
    # Whole on every device: any width is allowed, and it is small.
    matrix = weight(self, 'map', '..', shape, variance, dtype)
    spec = mesh.act('BTD')
    return (token_product('d,de->e', x.astype(dtype), matrix, spec),)


class CoAttentionFusion(nn.Module):
  """`CoAttention` layers, `layer_00` and so on, and a norm of each stream.

  Attributes:
    text, image: the streams whose states are fused.
    num_layers: how often they meet.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  text: ModelConfig
  image: ModelConfig
  num_layers: int
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  def __call__(
    self,
    text: Float[Array, 'B T D'],
    image: Float[Array, 'B S E'] | None,
    positions: Int[Array, 'B T'],
    text_segment_ids: Int[Array, 'B T'],
    image_segment_ids: Int[Array, 'B S'],
    gate: Float[Array, 'B S'] | None = None,
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'B S E'] | None, Cache | None]:
    """Both streams, normalised, and the cache.

    Arguments are those of `CoAttention`; the cache is of all layers, see
    `captions.init_cache`.
    """
    streams = [
      fusion_stream(config, self.num_layers)
      for config in (self.text, self.image)
    ]
    new_cache = begun(cache)
    for i in range(self.num_layers):
      layer = CoAttention(*streams, self.axes, name=f'layer_{i:02}')
      text, image, of_layer = layer(
        text,
        image,
        positions,
        text_segment_ids,
        image_segment_ids,
        gate,
        block_cache(cache, i),
      )
      new_cache = with_block(new_cache, streams[0], i, of_layer)
    text = norm(self.text, 'text_norm')(text)
    if image is not None:
      image = norm(self.image, 'image_norm')(image)
    return text, image, new_cache


class ConcatFusion(nn.Module):
  """One stream of blocks over text and picture, which sees all of both.

  Leaves: `image_map` [E, D], `types` [2, D] that say which is which, blocks and
  `final_norm`.

  Attributes:
    config: stream of the text, whose width it has.
    num_layers: of its blocks.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  config: ModelConfig
  num_layers: int
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(returns=('tokens', 'tokens'))
  def __call__(
    self,
    text: Float[Array, 'B T D'],
    image: Float[Array, 'B S E'],
    text_segment_ids: Int[Array, 'B T'],
    image_segment_ids: Int[Array, 'B S'],
  ) -> tuple[Float[Array, 'B L D'], Int[Array, 'B L']]:
    """States of the text's tokens and then of the patches, and segments."""
    config = fusion_stream(self.config, self.num_layers)
    width, dtype = text.shape[-1], config.dtype
    reading = 1 / image.shape[-1]
    shape = (image.shape[-1], width)
    matrix = weight(self, 'image_map', 'D.', shape, reading, dtype)
    types = weight(self, 'types', '.D', (2, width), 1 / width, dtype)
    image = token_product(
      'e,ed->d', image.astype(dtype), matrix, mesh.act('BTD')
    )
    parts = [text.astype(dtype) + types[None, :1], image + types[None, 1:]]
    x = jnp.concatenate(parts, axis=1)
    segments = jnp.concatenate([text_segment_ids, image_segment_ids], axis=1)
    # All at 0: places of two streams have no distance, and each knows its own.
    x, _, _ = run_blocks(config, x, jnp.zeros_like(segments), segments)
    return norm(config, 'final_norm')(x), segments
