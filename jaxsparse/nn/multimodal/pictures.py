# SPDX-License-Identifier: Apache-2.0
"""Pictures, frames or patches as an encoder is given them, as patches."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.config import MultiModalConfig
from jaxsparse.config.errors import require
from jaxsparse.nn.leading import require_floats
from jaxsparse.ops.patches import patchify


def patches_of(
  images: Float[Array, 'B ...'],
  at: Int[Array, 'B ... 2'] | None,
  settings: MultiModalConfig,
) -> Float[Array, 'B ... P']:
  """Patches [B, L, P] of pictures, [B, F, L, P] of frames.

  Args:
    images: pictures [B, S, S, 3], frames [B, F, S, S, 3] or patches.
    at: place of each patch. Without it pictures are of the size, and frames of
      the number, that the settings say; with it their sides may be others, and
      patches [B, L, P] are of F frames one after another.
    settings: of pictures and frames.

  Raises:
    UserError: they are of another shape, or no floating-point numbers.
  """
  images = jnp.asarray(images)
  vision, num_frames = settings.vision, settings.num_frames
  shape, wanted = images.shape[1:], settings.image_shape
  if at is None:
    is_right = shape == wanted
  elif len(shape) == 2:
    is_right = shape[0] % num_frames == 0 and shape[1] == vision.patch_dim
  else:
    is_right = len(shape) == len(wanted) and shape[-1] == 3
    is_right = is_right and shape[:-3] == wanted[:-3]
  kind = 'pictures' if num_frames == 1 else f'videos of {num_frames} frames'
  sizes = ', '.join(map(str, wanted))
  require(
    is_right,
    f'images must be {kind} [B, {sizes}], as image_size = {vision.image_size} '
    f'and num_frames = {num_frames} say, or patches [B, L, {vision.patch_dim}] '
    f'with `at`, a row and a column of each; got {list(images.shape)}.',
  )
  require_floats(images, 'images')
  if len(shape) == 2:
    return images
  return patchify(images, vision.patch_size)
