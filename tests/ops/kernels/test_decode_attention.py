# SPDX-License-Identifier: Apache-2.0
"""Attention of one token, interpreted on a CPU, is our attention's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.ops.attention import libraries
from jaxsparse.ops.attention.dense import attention, attention_reference
from jaxsparse.ops.kernels import decode_attention as kernel
from jaxsparse.ops.quantized_rows import dequantize_rows, quantize_rows

S = 150  # Of three blocks of rows, the last one part empty.


def make_inputs(num_kv_heads, group, width, seed=0):
  """A long document, the second of two after padding, one that begins."""
  rng = np.random.default_rng(seed)
  segments = np.zeros((4, S), np.int32)
  positions = np.tile(np.arange(S, dtype=np.int32), (4, 1))
  segments[0, :100], segments[2] = 1, 1
  segments[1, 10:50], segments[1, 50:120] = 1, 2
  positions[1, 50:120] = np.arange(70)
  # The last sequence is padding alone.
  own = np.array([[99], [69], [5], [0]], np.int32)
  own_segments = np.array([[1], [2], [1], [0]], np.int32)

  def heads(*shape):
    return rng.normal(size=(4, *shape, width)).astype(np.float32)

  return (
    heads(1, num_kv_heads * group),
    heads(S, num_kv_heads),
    heads(S, num_kv_heads),
    own,
    positions,
    own_segments,
    segments,
  )


@pytest.fixture
def on_gpu(monkeypatch):
  """As if this were one, with the kernel interpreted."""
  run = functools.partial(kernel.decode_attention, interpret=True)
  monkeypatch.setattr(libraries, 'decode_attention', run)
  monkeypatch.setattr(mesh, 'platform', lambda: 'gpu')
  libraries._decoding_error.cache_clear()
  yield
  libraries._decoding_error.cache_clear()


@pytest.mark.parametrize(
  ('num_kv_heads', 'group', 'width', 'num_programs', 'window'),
  few(
    [(2, 4, 24, 512, 7), (3, 1, 16, 1, 7), (1, 20, 32, 5, 0)],
    [
      (*sizes, window)
      for sizes in ((2, 4, 24, 512), (3, 1, 16, 1), (1, 20, 32, 5))
      for window in (0, 7)
    ],
  ),
)
def test_it_is_the_definition(
  num_kv_heads, group, width, num_programs, window, on_gpu, monkeypatch
):
  monkeypatch.setattr(kernel, '_PROGRAMS', num_programs)
  inputs = make_inputs(num_kv_heads, group, width)

  @jax.jit
  def both(*inputs):
    y = attention(*inputs, window=window, implementation='pallas')
    return y, attention_reference(*inputs, window=window)

  y, expected = both(*inputs)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  assert not np.any(np.asarray(y)[3])


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_it_reads_codes_with_their_scales(dtype, on_gpu):
  query, key, value, *rows = make_inputs(2, 4, 24)

  @jax.jit
  def both(query, key, value, *rows):
    codes = quantize_rows(key), quantize_rows(value)
    y = attention(query.astype(dtype), *codes, *rows, implementation='pallas')
    return y, attention_reference(query, *map(dequantize_rows, codes), *rows)

  y, expected = both(query, key, value, *rows)
  assert y.dtype == dtype
  atol = 1e-5 if dtype == 'float32' else 5e-3
  np.testing.assert_allclose(y, expected, atol=atol)


def test_devices_run_it_on_their_own_heads(on_gpu):
  inputs = make_inputs(2, 2, 16)
  expected = jax.jit(attention_reference)(*inputs)
  with jax.set_mesh(mesh.make_mesh(2, 2, 2)):
    dims = ('BT..', 'BS..', 'BS..', 'BT', 'BS', 'BT', 'BS')
    placed = [
      jax.device_put(x, mesh.act(d)) for x, d in zip(inputs, dims, strict=True)
    ]
    y = jax.jit(functools.partial(attention, implementation='auto'))(*placed)
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_what_it_does_not_serve(on_gpu):
  call = libraries.Call(
    length=1,
    num_keys=S,
    num_heads=4,
    num_kv_heads=2,
    width=16,
    dtype=jnp.dtype('float32'),
    window=0,
    is_composed=False,
  )
  assert libraries.choose('auto', call) == 'pallas'
  assert libraries.choose('xla', call) == 'xla'
  wide = dataclasses.replace(call, dtype=jnp.dtype('float64'))
  assert libraries.choose('auto', wide) == 'xla'
  composed = dataclasses.replace(call, is_composed=True)
  with pytest.raises(UserError, match='it does not compose heads'):
    libraries.choose('pallas', composed)
