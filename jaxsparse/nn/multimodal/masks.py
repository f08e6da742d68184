# SPDX-License-Identifier: Apache-2.0
"""What of a batch is there, as segment ids, and where."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from jaxsparse.config.errors import require
from jaxsparse.ops.patches import reshaped

Mask = Bool[Array, 'B ...'] | Int[Array, 'B ...']


def segments_of(
  mask: Mask | None, x: jax.Array, shape: tuple[int, ...] | None = None
) -> Int[Array, 'B ...']:
  """Segment ids of a shape, by default the first two dimensions of `x`.

  Args:
    mask: of its first dimensions; None for all of one segment.
    x: beside which they lie.
    shape: what they are for.

  Raises:
    UserError: the mask is of other dimensions.
  """
  shape = x.shape[:2] if shape is None else shape
  if mask is None:
    # Of `x`, so as to lie as it lies.
    of_x = x[..., 0] if x.ndim > len(shape) else x
    return jnp.ones_like(of_x, jnp.int32)
  mask = jnp.asarray(mask)
  num_dims = mask.ndim
  require(
    mask.shape == shape[:num_dims],
    f'a mask must have the dimensions {list(shape)}, or the first ones of '
    f'them, got {list(mask.shape)}.',
  )
  mask = mask.astype(jnp.int32)
  mask = reshaped(mask, num_dims, (1,) * (len(shape) - num_dims))
  return jnp.broadcast_to(mask, shape)


def positions_of(segment_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Positions in a row, which leave out padding wherever it stands."""
  return jnp.maximum(jnp.cumsum(segment_ids > 0, axis=-1) - 1, 0)


def only_there(
  x: Num[Array, 'B L D'], segment_ids: Int[Array, 'B L']
) -> Num[Array, 'B L D']:
  """`x` with zeros for padding: a factor of 0 leaves NaN as it is."""
  return jnp.where(segment_ids[..., None] > 0, x, jnp.zeros_like(x))
