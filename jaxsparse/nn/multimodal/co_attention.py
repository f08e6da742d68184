# SPDX-License-Identifier: Apache-2.0
"""Two streams that read each other (ViLBERT, arXiv:1908.02265)."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.block import Block, Cache
from jaxsparse.nn.door import portable
from jaxsparse.nn.multimodal.cross_attention import CrossAttention, mlp, norm


class CoAttention(nn.Module):
  """One layer: each stream reads the other as it was, then itself.

  t' = t + read(norm(t), norm(v)), t'' = t' + MLP(norm(t')), and a `Block` of
  self-attention; v alike, unless the text is causal: what a text's end says
  would then reach its beginning through the picture, which stays as it is
  (CoCa, arXiv:2205.01917).

  Attributes:
    text, image: streams, see `config.multimodal.fusion_stream`.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  text: ModelConfig
  image: ModelConfig
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(returns=('tokens', 'tokens', 'cache'))
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
    """Both streams after the layer, and the cache.

    Args:
      text: states of the text.
      image: states of patches, of any width; None where a cache has what is
        read of them.
      positions: of the text's tokens.
      text_segment_ids: item of each token; 0 for padding.
      image_segment_ids: item of each patch; 0 for padding.
      gate: factors of what the text reads of each patch.
      cache: of a causal text's block, see `Block`, and in 'read' of the picture
        what `CrossAttention` keeps.
    """
    read = norm(self.text, 'text_read_norm')(text)
    of_image = kept = None
    if image is not None:
      of_image = norm(self.image, 'image_read_norm')(image)
    elif cache is not None:
      kept = cache['read']
    y, kept = CrossAttention(self.text, name='text_reads')(
      read, of_image, text_segment_ids, image_segment_ids, gate, kept
    )
    text += y
    if cache is not None:
      cache = cache | dict(read=kept)
    text, cache = self._go_on(
      'text', self.text, text, positions, text_segment_ids, cache
    )
    if self.text.is_causal:
      return text, image, cache
    y, _ = CrossAttention(self.image, name='image_reads')(
      of_image, read, image_segment_ids, text_segment_ids
    )
    image += y
    at = image_segment_ids * 0
    image, _ = self._go_on('image', self.image, image, at, image_segment_ids)
    return text, image, cache

  def _go_on(self, name, config, x, positions, segment_ids, cache=None):
    """The MLP of a stream, and a block of its own."""
    y, _ = mlp(config, f'{name}_mlp')(norm(config, f'{name}_mlp_norm')(x))
    block = Block(config, 0, name=f'{name}_block')
    x, _, cache, _ = block(x + y, positions, segment_ids, cache)
    return x, cache
