# SPDX-License-Identifier: Apache-2.0
"""Attention from products to sums, interpreted on a CPU, is step by step's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.ops.attention.rope import frequencies
from jaxsparse.ops.kernels import attend as kernel

B, S, N, K, H = 3, 150, 4, 2, 24


@functools.partial(jax.jit, static_argnums=0)
def both(num_heads, *inputs):
  return (
    kernel.attend(*inputs, num_heads, interpret=True),
    kernel.attend_reference(*inputs, num_heads),
  )


def make_inputs():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  # A full sequence, one that begins behind padding, and a first token.
  index = jnp.asarray([150, 100, 0], jnp.int32)
  position = jnp.asarray([150, 30, 0], jnp.int32)
  return dict(
    qkv=draw(B, (N + 2 * K) * H),
    frequency=jnp.asarray(frequencies(H)),
    key=draw(B, K, S, H),
    value=draw(B, K, S, H),
    index=index,
    position=position,
  )


@pytest.mark.parametrize('num_programs', few([32], [32, 1]))
def test_it_is_step_by_step(num_programs, monkeypatch):
  # Of three parts, the last of which has few rows; or in one.
  monkeypatch.setattr(kernel, '_PROGRAMS', num_programs)
  both.clear_cache()
  for got, expected in zip(*both(N, *make_inputs().values()), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_serve():
  inputs = make_inputs()

  def why(**others):
    return str(kernel.unsupported_reason(**inputs | others, num_heads=N))

  assert 'this is cpu' in why()
  assert 'rows of bfloat16' in why(key=inputs['key'].astype(jnp.bfloat16))
  odd = inputs['key'][..., :15]
  assert 'no halves' in why(key=odd, value=odd)
  tiny = inputs['qkv'].astype(jnp.float8_e4m3fn)
  assert '16 or 32 bits' in why(qkv=tiny)
