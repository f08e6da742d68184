# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8 bits: their codes, and attention that reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh
from jaxsparse.ops.attention.compose import HeadMix
from jaxsparse.ops.attention.dense import attention, attention_reference
from jaxsparse.ops.quantized_rows import (
  QuantizedRows,
  dequantize_rows,
  quantize_rows,
  split_rows,
)

K, G, H = 2, 2, 8

# By one program each, and not by one of each operation.
quantized = jax.jit(quantize_rows)
numbers_of = jax.jit(dequantize_rows)
reference = jax.jit(attention_reference, static_argnames='window')


def test_golden_row():
  row = [0.1, -0.7, 0.35, 0, 0.69, -0.06, 0.2, -0.2]
  rows = quantize_rows(jnp.array([row, [0.0] * 8], jnp.float32))
  np.testing.assert_array_equal(
    rows.codes, [[18, -127, 64, 0, 125, -11, 36, -36], [0] * 8]
  )
  np.testing.assert_allclose(rows.scale, [0.005511811, 0], rtol=1e-6)
  assert (rows.codes.dtype, rows.scale.dtype) == (jnp.int8, jnp.float32)
  numbers = dequantize_rows(rows)
  np.testing.assert_allclose(numbers[0], row, atol=0.0056 / 2)
  # A second time nothing is lost.
  np.testing.assert_array_equal(quantize_rows(numbers).codes, rows.codes)


def test_odd_rows():
  rows = jnp.array(
    [[-0.0, 1e-30, 3e4, -1.0], [0.5, -1.5, 2.5, -127.0]], jnp.float32
  )
  codes, scale = quantize_rows(rows)
  # Half to even.
  np.testing.assert_array_equal(codes, [[0, 0, 127, 0], [0, -2, 2, -127]])
  assert scale[1] == 1
  short = quantize_rows(rows.astype(jnp.bfloat16))
  np.testing.assert_array_equal(short.codes, codes)
  numbers, beside = split_rows(short, jnp.bfloat16)
  np.testing.assert_array_equal(numbers.astype(jnp.float32), codes)
  assert beside is short.scale
  assert split_rows(rows, jnp.bfloat16) == (rows, None)


def test_error_of_normal_rows():
  """A tenth of what 4 bits lose; that of the reference's table."""
  x = np.random.default_rng(0).normal(size=(4096, 256)).astype(np.float32)
  error = np.sqrt(np.mean((numbers_of(quantized(x)) - x) ** 2))
  np.testing.assert_allclose(error, 0.0070, rtol=0.03)


def test_error_of_scores_is_that_of_rounding():
  """Each code is off by up to half a step, evenly."""
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 512, 64)).astype(np.float32)
  rows = quantized(key)
  error = query @ (numbers_of(rows) - key).T
  predicted = np.linalg.norm(query, axis=1)[:, None] * np.asarray(rows.scale)
  predicted /= 12**0.5
  rms = np.sqrt(((error / predicted) ** 2).mean())
  np.testing.assert_allclose(rms, 1, atol=0.05)


def make_inputs(num_queries, num_rows, seed=0):
  rng = np.random.default_rng(seed)

  def heads(*shape):
    x = rng.normal(size=(2, *shape, H)).astype(np.float32)
    return jax.device_put(x)

  at = np.tile(np.arange(num_rows, dtype=np.int32), (2, 1))
  segments = np.ones_like(at)
  segments[1, :5] = 0
  last = slice(num_rows - num_queries, None)
  heads = heads(num_queries, K * G), heads(num_rows, K), heads(num_rows, K)
  rows = at[:, last], at, segments[:, last], segments
  return heads, tuple(map(jax.device_put, rows))


def make_mixes(num_queries, num_rows):
  rng = np.random.default_rng(1)

  def factors(length):
    factors = 0.3 * rng.normal(size=(2, length, 5, K * G))
    return jax.device_put(factors.astype(np.float32))

  return {
    place: HeadMix(query=factors(num_queries), key=factors(num_rows))
    for place in ('pre', 'post')
  }


@pytest.mark.parametrize(
  ('num_queries', 'num_rows', 'is_composed', 'options'),
  few(
    [(1, 300, False, {}), (3, 40, True, {})],
    [
      (1, 128, False, dict(window=9)),
      # Parts of rows on a CPU, with some left over and without.
      (1, 256, False, {}),
      (1, 300, False, {}),
      (5, 257, False, dict(window=200)),
      (1, 300, True, {}),
      (3, 40, True, {}),
      (7, 140, True, dict(chunk=3)),
      (7, 140, False, dict(chunk=3, window=20)),
    ],
  ),
)
def test_attention_reads_codes(num_queries, num_rows, is_composed, options):
  """As it reads the numbers that they stand for."""
  (query, key, value), rows = make_inputs(num_queries, num_rows)
  mixes = make_mixes(num_queries, num_rows) if is_composed else {}
  reads = dict(window=options.get('window', 0), **mixes)

  @jax.jit
  def both(query, key, value):
    codes = quantize_rows(key), quantize_rows(value)
    y = attention(query, *codes, *rows, **options, **mixes)
    numbers = map(dequantize_rows, codes)
    return y, attention_reference(query, *numbers, *rows, **reads)

  y, expected = both(query, key, value)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  exact = reference(query, key, value, *rows, **reads)
  error = np.abs(np.asarray(expected) - exact).max()
  # It is another result, by what 8 bits lose.
  assert 1e-4 < error < 0.05


def test_sums_are_of_the_queries_type():
  (query, key, value), rows = make_inputs(1, 300)
  short = query.astype(jnp.bfloat16)
  codes = quantized(key), quantized(value)
  y = jax.jit(attention)(short, *codes, *rows)
  assert y.dtype == jnp.bfloat16
  expected = reference(query, *map(numbers_of, codes), *rows)
  np.testing.assert_allclose(np.float32(y), expected, atol=0.02)


def test_devices_read_their_own_heads():
  (query, key, value), rows = make_inputs(1, 300)
  codes = quantized(key), quantized(value)
  expected = reference(query, *map(numbers_of, codes), *rows)
  with jax.set_mesh(mesh.make_mesh(1, 2, 2, devices=jax.devices()[:4])):

    def placed(x, dims):
      return jax.device_put(x, mesh.act(dims))

    heads = [
      placed(query, 'BTN.'),
      *(
        QuantizedRows(placed(x.codes, 'BSK.'), placed(x.scale, 'BSK'))
        for x in codes
      ),
    ]
    ids = [placed(x, 'BS') for x in rows]
    y = jax.jit(attention)(*heads, *ids)
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_no_row_becomes_numbers_at_once():
  """On a CPU all of them would be four times the bytes of their codes."""
  num_rows, width = 2048, 64
  # As they lie in a cache.
  shape = (1, 4, num_rows, width)
  rows = QuantizedRows(
    jax.ShapeDtypeStruct(shape, jnp.int8),
    jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
  )
  query = jax.ShapeDtypeStruct((1, 1, 8, width), jnp.float32)
  ids = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (1, num_rows)] * 2

  def read(query, key, value, *ids):
    turned = (
      jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), x) for x in (key, value)
    )
    return attention(query, *turned, *ids)

  program = jax.jit(read).lower(query, rows, rows, *ids).compile()
  of_codes = 4 * num_rows * width
  scores = 4 * 8 * num_rows
  held = program.memory_analysis().temp_size_in_bytes
  assert held < of_codes + 4 * scores
