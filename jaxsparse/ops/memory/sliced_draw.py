# SPDX-License-Identifier: Apache-2.0
"""Rows of a random array, drawn without the others.

JAX's generator hashes the key with the place of each element, so that elements
can be drawn alone. Here it is one whose places begin further on: what draws an
array of the first rows with it gets later ones, bit for bit.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random
from jaxtyping import Array, Shaped, UInt32


def draw_rows(
  draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
  key: UInt32[Array, '2'],
  first_element: UInt32[Array, '2'],
  shape: tuple[int, ...],
) -> Shaped[Array, '...']:
  """A slice of `draw(key, the whole shape)`.

  Args:
    draw: makes an array of a key and a shape, one draw of the generator, such
      as the initializers of Flax.
    key: data of a threefry key.
    first_element: how many elements of the whole come before the slice: its
      upper 32 bits and its lower.
    shape: of the slice.
  """
  data = jnp.concatenate([key, first_element])
  return draw(jax.random.wrap_key_data(data, impl=_IMPL), shape)


def place_of(first_element: int) -> np.ndarray:
  """`first_element` of `draw_rows` for a number."""
  return np.array([first_element >> 32, first_element % 2**32], np.uint32)


def _bits(data, bit_width, shape):
  """What `jax.random.bits` draws, from a place on."""
  key, first = data[:2], data[2:]
  size = math.prod(shape)
  low = first[1] + jnp.arange(size, dtype=jnp.uint32)
  # Beyond 2^32 elements the upper word counts on.
  high = first[0] + (low < first[1]).astype(jnp.uint32)
  hashed = random.threefry_2x32(tuple(key), jnp.concatenate([high, low]))
  bits = hashed[:size] ^ hashed[size:]
  return bits.astype(f'uint{bit_width}').reshape(shape)


def _unused(*_):
  raise NotImplementedError('a place in a draw is no key to split.')


_IMPL = random.define_prng_impl(
  key_shape=(4,),
  seed=_unused,
  split=_unused,
  random_bits=_bits,
  fold_in=_unused,
  name='threefry_from_a_place',
  tag='fry_at',
)
