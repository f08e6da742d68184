# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8 bits a number, with a scale for each token and head.

  s = max |x| / 127      codes = x / s rounded, half to even, -127 .. 127

A head's row of width H takes H + 4 bytes. A score is the query's product with
the codes times the key's scale, and a sum of values has the scales in its
weights: neither needs the rows as numbers. All rows have their own scale, so
what was written stays as it is, whatever comes after it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of the numbers' range, which is symmetric.
_MOST = 127


class QuantizedRows(NamedTuple):
  """Stands where an array [..., H] of keys or values stood.

  Slices, copies and turns of all axes but the last are those of both parts.

  Attributes:
    codes: int8 [..., H]; also what describes such an array, such as letters.
    scale: f32 [...].
  """

  codes: Any
  scale: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def ndim(self) -> int:
    return self.codes.ndim


Rows = Float[Array, '*rows H'] | QuantizedRows


def quantize_rows(x: Float[Array, '*rows H']) -> QuantizedRows:
  """Each row to codes; one of zeros has the scale 0."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  scale = jnp.abs(x).max(-1) / _MOST
  divisor = jnp.where(scale > 0, scale, 1)[..., None]
  codes = jnp.clip(jnp.round(x / divisor), -_MOST, _MOST).astype(jnp.int8)
  return QuantizedRows(codes, scale.astype(jnp.float32))


def dequantize_rows(
  rows: QuantizedRows, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, '*rows H']:
  """The numbers that the codes stand for."""
  return (rows.codes * rows.scale[..., None]).astype(dtype)


def dtype_of_sums(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
  """In which weights times scales are multiplied with codes.

  The exponents of float16 have no room for such weights of many tokens.
  """
  return jnp.float32 if dtype == jnp.float16 else dtype


def split_rows(
  x: Rows, dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, '*rows H'], Float[Array, '*rows'] | None]:
  """Numbers and the scale that they lack; None for rows that lack none.

  `dtype` is that of codes: 8 bits are exact in any type of activations.
  """
  if isinstance(x, QuantizedRows):
    return x.codes.astype(dtype), x.scale
  return x, None
