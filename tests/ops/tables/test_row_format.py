# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.ops.tables import row_format
from jaxsparse.ops.tables.quantized_table import encoded

ROW = np.array([[0.1, -0.7, 0.35, 0, 0.69, -0.06, 0.2, -0.2]], np.float32)

encode = jax.jit(row_format.encode_rows, static_argnums=(1, 2, 3))
decode = jax.jit(row_format.decode_rows, static_argnums=(1, 2, 3))


def normal(rows, width, seed=0):
  rng = np.random.default_rng(seed)
  # Unlike `jnp.asarray`, without a program for each shape.
  return jax.device_put(rng.normal(size=(rows, width)).astype(np.float32))


def relative_error(values, kind, *args):
  stored = encode(values, kind, *args)
  decoded = np.asarray(decode(stored, kind, values.shape[1], *args[:1]))
  return np.linalg.norm(decoded - values) / np.linalg.norm(values)


@pytest.mark.parametrize(
  ('kind', 'codes', 'scale'),
  [
    ('int8', [18, 129, 64, 0, 125, 245, 36, 220], 0.7 / 127),
    ('int4', [0x71, 0xF9, 0x24, 0xE0], 0.1),
  ],
)
def test_a_golden_row(kind, codes, scale):
  (row,) = np.asarray(encode(ROW, kind))
  scale = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
  free = [0] * (12 - len(codes))
  assert row.tolist() == [*codes, *free, *scale.tolist()]


@pytest.mark.parametrize(
  ('kind', 'parts'), list(itertools.product(row_format.KINDS, [1, 3]))
)
def test_decoding_equals_number_by_number(kind, parts):
  stored = encode(normal(5, 24), kind, parts)
  decoded = decode(stored, kind, 24, parts)
  assert decoded.dtype == jnp.float32
  np.testing.assert_array_equal(
    decoded,
    row_format.decode_rows_reference(np.asarray(stored), kind, 24, parts),
  )


def test_every_byte_of_float8_is_its_number():
  row = np.zeros((1, 272), np.uint8)
  row[0, :256] = np.arange(256)
  row[0, -4:] = np.float32([1]).view(np.uint8)
  finite = ~np.isin(np.arange(256), [127, 255])
  expected = row[:, :256].view(jnp.float8_e4m3fn).astype(np.float32)
  decoded = np.asarray(decode(row, 'float8', 256))
  np.testing.assert_array_equal(decoded[:, finite], expected[:, finite])


# Of normal numbers, in rows of 256.
@pytest.mark.parametrize(
  ('kind', 'error'), [('int8', 0.0070), ('int4', 0.126), ('float8', 0.026)]
)
def test_the_error_of_normal_rows(kind, error):
  assert relative_error(normal(512, 256), kind) == pytest.approx(
    error, rel=0.05
  )


def test_a_row_of_zeros_and_rows_of_one_number():
  values = np.zeros((3, 32), np.float32)
  values[1, 5] = -3e4
  values[2] = 1e-42  # Its scale is none that a float has.
  for kind in row_format.KINDS:
    decoded = decode(encode(values, kind), kind, 32)
    np.testing.assert_allclose(decoded, values, rtol=1e-6, atol=1e-41)


def test_an_outlier_costs_its_own_part_only():
  values = normal(64, 32).at[:, 3].set(100)
  calm = values[:, 16:]

  def error(parts):
    decoded = decode(encode(values, 'int8', parts), 'int8', 32, parts)
    return np.abs(np.asarray(decoded)[:, 16:] - calm).max()

  assert error(1) > 0.3
  assert error(2) < 0.02


def test_what_is_not_finite_makes_its_row_nan():
  values = np.ones((3, 16), np.float32)
  values[1, 2], values[2, 7] = np.inf, np.nan
  for kind in row_format.KINDS:
    decoded = np.asarray(decode(encode(values, kind), kind, 16))
    assert np.isfinite(decoded[0]).all()
    assert not np.isfinite(decoded[1:]).any()


def test_bf16_rows_are_taken_as_their_numbers():
  values = normal(4, 16).astype(jnp.bfloat16)
  np.testing.assert_array_equal(
    encode(values, 'int4'), encode(values.astype(jnp.float32), 'int4')
  )


def test_a_search_of_the_clip_lowers_the_error():
  values = normal(256, 256)
  plain = relative_error(values, 'int4')
  searched = relative_error(values, 'int4', 1, True)
  assert searched < 0.93 * plain
  # Row by row: never more.
  for i in range(4):
    row = values[i : i + 1]
    assert relative_error(row, 'int4', 1, True) <= relative_error(row, 'int4')


def test_bytes_of_a_row():
  assert row_format.row_bytes(256, 'int8') == 272
  assert row_format.row_bytes(256, 'int4') == 144
  assert row_format.row_bytes(2, 'int4') == 16
  assert row_format.row_bytes(256, 'int4', parts=4) == 4 * 48


def test_a_cut_between_parts_is_a_row_of_its_own():
  values = normal(4, 32)
  whole = np.asarray(encode(values, 'int4', 2))
  for half, block in zip(
    np.split(whole, 2, axis=1), np.split(values, 2, axis=1), strict=True
  ):
    np.testing.assert_array_equal(half, encode(block, 'int4'))


@pytest.mark.parametrize('kind', row_format.KINDS)
def test_more_parts_of_the_same_numbers(kind):
  table = encoded(normal(6, 48), kind, 2)
  cut = table.in_parts(6)
  assert cut.shape == table.shape
  np.testing.assert_array_equal(cut.dequantized(), table.dequantized())
  with pytest.raises(ValueError, match='2 parts of a row cannot be made 3'):
    table.in_parts(3)


@pytest.mark.parametrize(
  ('kind', 'width', 'parts', 'clip_search', 'message'),
  [
    ('int3', 8, 1, False, "kind = 'int3' must be one of 'int8', 'int4', 'fl"),
    ('int4', 7, 1, False, 'int4 rows in 1 parts must have a multiple of 2 col'),
    ('int4', 12, 4, False, 'a multiple of 8 columns, got 12'),
    ('int8', 8, 1, True, "clip_search = True is for kind = 'int4', got 'int8'"),
  ],
)
def test_what_cannot_be_stored(kind, width, parts, clip_search, message):
  with pytest.raises(UserError, match=message):
    row_format.encode_rows(normal(2, width), kind, parts, clip_search)
