# SPDX-License-Identifier: Apache-2.0
"""Rows drawn alone are those of the whole draw."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxsparse.ops.memory.sliced_draw import draw_rows, place_of


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_slice_is_that_of_the_whole(dtype):
  draw, key = nn.initializers.normal(0.3, dtype), jax.random.key(5)
  whole = np.asarray(jax.jit(draw, static_argnums=1)(key, (200, 12)))
  sliced = jax.jit(functools.partial(draw_rows, draw), static_argnums=2)
  for first in (0, 130):
    part = sliced(jax.random.key_data(key), place_of(first * 12), (70, 12))
    assert np.asarray(part).tobytes() == whole[first : first + 70].tobytes()


def test_places_go_on_beyond_32_bits():
  key = jax.random.key_data(jax.random.key(5))
  sliced = jax.jit(
    functools.partial(draw_rows, jax.random.bits), static_argnums=2
  )
  around = sliced(key, place_of(2**32 - 3), (8,))
  beyond = sliced(key, place_of(2**32), (8,))
  np.testing.assert_array_equal(around[3:], beyond[:5])
  assert len({*around.tolist(), *beyond.tolist()}) == 11
