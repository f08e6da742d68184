# SPDX-License-Identifier: Apache-2.0
"""Parameters by which a text chooses frames, see `ops`' `frame_choice`."""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig, MultiModalConfig
from jaxsparse.config.errors import require
from jaxsparse.nn.attention import heads
from jaxsparse.nn.door import portable
from jaxsparse.ops.patches import mean_of_segments
from jaxsparse.ops.sparse_attention import frame_choice


class FrameRouter(nn.Module):
  """Leaves of a video's patches those of the frames that are read.

  Leaves of 'routed': `query` [D, N, H] and `key` [E, 1, H]. It knows nothing of
  a frame's place: another order of frames is the same choice.

  Attributes:
    config: what is read, and who chooses.
    stream: of the text, whose numbers and widths of heads it has.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  config: MultiModalConfig
  stream: ModelConfig
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(returns=('tokens',) * 5)
  def __call__(
    self,
    image: Float[Array, 'B S E'],
    image_segment_ids: Int[Array, 'B S'],
    text: Float[Array, 'B T D'] | None = None,
    text_segment_ids: Int[Array, 'B T'] | None = None,
  ) -> tuple:
    """Patches, their segments and gates, and of frames what is read.

    Args:
      image: states of the patches of all frames, one after another.
      image_segment_ids: 0 for padding, such as a frame that is not there.
      text: states of the text, which only a routed choice looks at.
      text_segment_ids: 0 for padding; all others are of one text.

    Returns:
      The patches [B, k L, E], segments [B, k L] and gates [B, k L] of those
      that are read, the frames' shares [B, F], and the number of frames that
      are read and that are there [B, 2].

    Raises:
      UserError: the patches are not those of as many frames.
    """
    config = self.config
    num_frames, num_read = config.num_frames, config.most_frames_read
    require(
      image.shape[1] % num_frames == 0,
      f'image must have the patches of num_frames = {num_frames} frames, as '
      f'many of each; got {image.shape[1]} in all.',
    )
    choose = functools.partial(
      _choose, config=config, num_frames=num_frames, num_read=num_read
    )
    asked = ()
    if config.frame_choice == 'routed':
      is_text = (text_segment_ids > 0).astype(jnp.int32)
      asked = self._heads(mean_of_segments(text, is_text, 1), image)
    return mesh.over_tokens(choose)(image, image_segment_ids, *asked)

  def _heads(self, text, image):
    """Of the text [B, 1, N, H], and keys of all patches [B, S, 1, H]."""
    stream = dataclasses.replace(
      self.stream, dtype='float32', bias='none', dcmha=None, num_kv_heads=1
    )
    return (
      heads.project(self, stream, text.astype(jnp.float32), 'query', 'D..'),
      heads.project(self, stream, image.astype(jnp.float32), 'key', 'D..'),
    )


def _choose(image, segment_ids, *asked, config, num_frames, num_read):
  batch, length, width = image.shape
  frames = image.reshape(batch, num_frames, length // num_frames, width)
  segments = segment_ids.reshape(frames.shape[:3])
  is_there = (segments > 0).any(-1)
  if config.frame_choice == 'routed':
    query, key = asked
    choice = frame_choice.routed(
      query[:, 0],
      _means(key[:, :, 0].reshape(*frames.shape[:3], -1), segments),
      is_there,
      num_read,
      config.frame_coverage,
    )
  elif config.frame_choice == 'change':
    choice = frame_choice.change(_means(frames, segments), is_there, num_read)
  else:
    choice = frame_choice.uniform(is_there, num_read)
  counts = jnp.stack([choice.is_read.sum(-1), is_there.sum(-1)], axis=-1)
  read = frame_choice.read_frames(choice, frames, segments)
  return *read, choice.shares, counts


def _means(x: Float[Array, 'B F L E'], segments: Int[Array, 'B F L']):
  is_own = (segments > 0).astype(jnp.float32)
  share = is_own / jnp.maximum(is_own.sum(-1, keepdims=True), 1)
  return jnp.einsum('bfl,bfle->bfe', share, x.astype(jnp.float32))
