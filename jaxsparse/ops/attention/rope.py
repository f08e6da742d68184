# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxsparse.ops.attention import cpu
from jaxsparse.ops.cpu import computed_once

# In radians a position.
Frequencies = Float[np.ndarray | Array, 'h']
# Of frequencies: other ones, for longer sequences.
Scaling = Callable[[Frequencies], Frequencies]


def linear_scaling(frequency: Frequencies, factor: float) -> Frequencies:
  """All divided by `factor` (Chen et al. 2023, arXiv:2306.15595, eq. 4)."""
  return frequency / factor


def llama3_scaling(
  frequency: Frequencies,
  factor: float,
  low_frequency_factor: float,
  high_frequency_factor: float,
  original_length: int,
) -> Frequencies:
  """The slow ones divided by `factor`, as Llama 3.1 does.

  Args:
    frequency: radians a position.
    factor: by which they are divided.
    low_frequency_factor: with up to so many turns within `original_length` one
      is divided whole.
    high_frequency_factor: from so many turns on one stays; between both the
      share that stays rises in a straight line.
    original_length: positions that were trained on first.
  """
  turns = frequency * (original_length / (2 * math.pi))
  between = high_frequency_factor - low_frequency_factor
  stays = ((turns - low_frequency_factor) / between).clip(0, 1)
  return frequency * (stays + (1 - stays) / factor)


def apply_rope(
  x: Float[Array, 'B T N H'],
  positions: Int[Array, 'B T'],
  max_wavelength: float = 10_000.0,
  width: int = 0,
  scaling: Scaling | None = None,
) -> Float[Array, 'B T N H']:
  """Rotates queries or keys by their positions.

  Coordinate i is paired with i + H/2 (not with its neighbour, as the paper
  writes it: a fixed permutation of the head width apart, it is the same), and
  the pair turns by position * max_wavelength ** (-2i / H) radians. Scores of
  rotated queries and keys depend on the difference of their positions only.

  Args:
    x: queries or keys, H even.
    positions: position of each token in its own document.
    max_wavelength: base of the geometric series of wavelengths, over 2 pi.
    width: coordinates that are rotated, the first ones, which take the place of
      H in the formula; 0 for all.
    scaling: of the frequencies; None leaves them as they are.

  Returns:
    The rotated heads in the type of `x`; the rotation itself is in float32.
  """
  if cpu.wants_heads_first(x.shape[1]):
    x = jnp.swapaxes(x, 1, 2)
    x = rotate(x, positions[:, None], max_wavelength, width, scaling)
    return jnp.swapaxes(x, 1, 2)
  return rotate(x, positions[:, :, None], max_wavelength, width, scaling)


def apply_rope_2d(
  x: Float[Array, 'B T N H'],
  positions: Int[Array, 'B T 2'],
  max_wavelength: float = 10_000.0,
  width: int = 0,
  scaling: Scaling | None = None,
) -> Float[Array, 'B T N H']:
  """`apply_rope` by rows and columns, such as those of a picture's patches.

  Scores depend on the differences of both only.

  Args:
    x: queries or keys.
    positions: row and column of each token.
    max_wavelength: as `apply_rope` takes it.
    width: coordinates that are rotated, a multiple of 4, of which the first
      half turns by rows and the second by columns; 0 for all.
    scaling: as `apply_rope` takes it.
  """
  width = width or x.shape[-1]
  by_row, by_column, rest = jnp.split(x, [width // 2, width], axis=-1)
  parts = [
    apply_rope(part, positions[..., i], max_wavelength, scaling=scaling)
    for i, part in enumerate((by_row, by_column))
  ]
  return jnp.concatenate([*parts, rest], axis=-1)


def rotate(
  x: Float[Array, '*shape H'],
  positions: Real[Array, '...'],
  max_wavelength: float = 10_000.0,
  width: int = 0,
  scaling: Scaling | None = None,
) -> Float[Array, '*shape H']:
  """`apply_rope` of any shape, over which the positions are broadcast."""
  if 0 < width < x.shape[-1]:
    first = rotate(x[..., :width], positions, max_wavelength, 0, scaling)
    return jnp.concatenate([first, x[..., width:]], axis=-1)
  frequency = frequencies(x.shape[-1], max_wavelength, scaling)
  frequency = frequency.reshape((1,) * positions.ndim + (-1,))
  angle = positions[..., None].astype(jnp.float32) * frequency
  cos, sin = computed_once(jnp.cos(angle)), computed_once(jnp.sin(angle))
  left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (left * cos - right * sin, right * cos + left * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def frequencies(
  width: int, max_wavelength: float = 10_000.0, scaling: Scaling | None = None
) -> Float[np.ndarray, 'h']:
  """Of each pair of a head of that width, float32.

  Numbers when a program is made: what every step would compute is one
  operation less in it, and the same on every device.
  """
  half = width // 2
  frequency = max_wavelength ** (-np.arange(half) / half)
  if scaling is not None:
    frequency = np.asarray(scaling(frequency))
  return frequency.astype(np.float32)


def apply_rope_reference(
  x: Float[Array, 'B T N H'],
  positions: Int[Array, 'B T'],
  max_wavelength: jax.typing.ArrayLike = 10_000.0,
  scaling: Scaling | None = None,
):
  """The same as a product of complex numbers."""
  half = x.shape[-1] // 2
  frequency = max_wavelength ** (-jnp.arange(half) / half)
  frequency = scaling(frequency) if scaling else frequency
  turn = jnp.exp(1j * jnp.einsum('bt,h->bth', positions, frequency))
  z = x[..., :half] + 1j * x[..., half:]
  z = jnp.einsum('btnh,bth->btnh', z, turn)
  return jnp.concatenate([z.real, z.imag], axis=-1)
