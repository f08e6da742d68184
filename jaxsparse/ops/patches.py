# SPDX-License-Identifier: Apache-2.0
"""Pictures as rows of patches (Dosovitskiy et al. 2021, arXiv:2010.11929).

Rows of patches come first, then columns; in a patch row, column, channel.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxsparse import mesh
from jaxsparse.config.errors import require


def patchify(
  images: Float[Array, '*B H W C'], size: int
) -> Float[Array, '*B L P']:
  """Patches of `size` pixels a side.

  Raises:
    UserError: a side of the pictures is no multiple of `size`.
  """
  *batch, height, width, channels = images.shape
  require(
    height % size == 0 and width % size == 0,
    f'pictures must have sides in multiples of patch_size = {size}, got '
    f'{height} x {width} pixels.',
  )
  rows, columns = height // size, width // size
  x = reshaped(images, len(batch), (rows, size, columns, size, channels))
  x = jnp.swapaxes(x, -4, -3)
  return reshaped(x, len(batch), (rows * columns, size * size * channels))


def unpatchify(
  patches: Float[Array, '*B L P'], size: int, num_columns: int
) -> Float[Array, '*B H W C']:
  """The pictures of which `patchify` made the patches.

  Args:
    patches: as `patchify` orders them.
    size: pixels along a side of one.
    num_columns: patches in a row of a picture.
  """
  *batch, length, numbers = patches.shape
  rows, channels = length // num_columns, numbers // size**2
  shape = (rows, num_columns, size, size, channels)
  x = jnp.swapaxes(reshaped(patches, len(batch), shape), -4, -3)
  return reshaped(x, len(batch), (rows * size, num_columns * size, channels))


def reshaped(
  x: Shaped[Array, '...'], num_kept: int, shape: tuple[int, ...]
) -> Shaped[Array, '...']:
  """`x` with other dimensions behind its first ones, which lie as they lie."""
  spec = mesh.spec_of(x)
  if spec is not None:
    spec = jax.P(*list(spec)[:num_kept], *[None] * len(shape))
  # An array of NumPy's has no such method.
  return jnp.reshape(x, (*x.shape[:num_kept], *shape), out_sharding=spec)


def places(num_rows: int, num_columns: int) -> Int[Array, 'L 2']:
  """Row and column of each patch, in the order of `patchify`."""
  grid = np.indices((num_rows, num_columns), dtype=np.int32)
  return jnp.asarray(grid.reshape(2, -1).T)


def sines_2d(
  at: Int[Array, '*B 2'], width: int, max_wavelength: float = 10_000.0
) -> Float[Array, '*B D']:
  """Sines and cosines of row, then of column, a quarter of the width each.

  Frequencies fall in a geometric series from 1 to 1 / max_wavelength, both
  among them, as in the release of Beyer et al. 2022 (arXiv:2205.01580).
  """
  quarter = width // 4
  exponent = jnp.arange(quarter, dtype=jnp.float32) / max(quarter - 1, 1)
  frequency = (max_wavelength**-exponent).reshape((1,) * at.ndim + (quarter,))
  angle = at[..., None].astype(jnp.float32) * frequency
  parts = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
  return reshaped(parts, at.ndim - 1, (width,))


def mean_of_segments(
  x: Float[Array, 'B L D'], segment_ids: Int[Array, 'B L'], num_segments: int
) -> Float[Array, 'B G D']:
  """Means over the rows of segments 1 to G, in f32; 0 of those without any."""
  wanted = jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)
  is_own = segment_ids[:, None, :] == wanted[None, :, None]
  count = jnp.maximum(is_own.sum(-1, keepdims=True), 1)
  share = is_own.astype(jnp.float32) / count
  return jnp.einsum('bgl,bld->bgd', share, x.astype(jnp.float32))
