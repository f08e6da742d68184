# SPDX-License-Identifier: Apache-2.0
"""Rows of a value table in 8 or 4 bits a number, the scale within the row.

A row is cut into `parts` of equal width w, each with codes and a scale of its
own, so that a table whose columns are split over devices is cut between parts:

  int8    w bytes    v / s rounded to -127 .. 127             s = max |v| / 127
  int4    w/2 bytes  v / s rounded to -7 .. 7; byte j has     s = max |v| / 7
                     column j in its low and column j + w/2
                     in its high half
  float8  w bytes    v / s rounded to an e4m3 float           s = max |v| / 448

Halves are rounded to even. The codes are followed by zeros up to a multiple of
16 bytes for the whole part, of which the last four are s, a little-endian f32.
A scale beside the codes would be one more miss of the cache for each read, and
misses are the time of a read. The halves of a byte are two blocks of columns
and no neighbours, so that both are unpacked as whole vectors.

A TPU has rows in multiples of 128 bytes, and would copy a table that is not;
there the scales are an array [M, P] of their own.

Uniform 4-bit rows are those of Guan et al. (arXiv:1911.02079), where the search
of a clip is from, too: outliers are cut off where a row's error is less so.

Letters: M rows, W width of a row, P parts, w = W / P, S bytes stored of a row.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Shaped, UInt8

from jaxsparse.config.errors import UserError, require

# The largest code of each.
_LARGEST = dict(int8=127.0, int4=7.0, float8=448.0)
KINDS = tuple(_LARGEST)

_ALIGNMENT, _SCALE_BYTES = 16, 4

# Shares of a row's largest number at which it may be cut off.
_CLIPS = tuple(1 - i / 20 for i in range(9))


def row_bytes(width: int, kind: str, parts: int = 1) -> int:
  """Bytes S of a row.

  Raises:
    UserError: there is no such kind, or it has no rows of this width.
  """
  require(
    kind in _LARGEST,
    f'kind = {kind!r} must be one of {", ".join(map(repr, KINDS))}.',
  )
  unit = parts * (2 if kind == 'int4' else 1)
  if width % unit:
    raise UserError(
      f'{kind} rows in {parts} parts must have a multiple of {unit} columns, '
      f'got {width}.'
    )
  used = code_bytes(width // parts, kind) + _SCALE_BYTES
  return parts * math.ceil(used / _ALIGNMENT) * _ALIGNMENT


def code_bytes(part_width: int, kind: str) -> int:
  """Bytes of a part without its scale."""
  return part_width // 2 if kind == 'int4' else part_width


def encode_rows(
  rows: Float[Array, 'M W'],
  kind: str,
  parts: int = 1,
  clip_search: bool = False,
) -> UInt8[Array, 'M S']:
  """Rows as they are stored.

  Args:
    rows: of numbers. A row that holds an infinity or a NaN is read as NaNs.
    kind: 'int8', 'int4' or 'float8'.
    parts: pieces of a row with a scale each.
    clip_search: of int4 rows, cut off the largest numbers where the squared
      error is less for it.

  Raises:
    UserError: there is no such kind, it has no rows of this width, or `clip` is
      `clip_search` is asked for of another than int4.
  """
  row_bytes(rows.shape[1], kind, parts)
  require(
    not clip_search or kind == 'int4',
    f"clip_search = True is for kind = 'int4', got {kind!r}.",
  )
  values = rows.astype(jnp.float32).reshape(len(rows), parts, -1)
  largest = jnp.abs(values).max(-1)
  if clip_search:
    largest = _clipped(values, largest)
  scale = largest / _LARGEST[kind]
  return joined(_codes(values, scale, kind), scale, kind)


def joined(
  codes: Shaped[Array, 'M P w'], scale: Float[Array, 'M P'], kind: str
) -> UInt8[Array, 'M S']:
  """Rows of codes in the order of their columns and of each part's scale."""
  if kind == 'int4':
    low, high = jnp.split(codes.astype(jnp.int8), 2, axis=-1)
    stored = (_bytes(low) & 15) | (_bytes(high) << 4)
  elif kind == 'int8':
    stored = _bytes(codes.astype(jnp.int8))
  else:
    stored = _bytes(codes.astype(jnp.float8_e4m3fn))
  free = row_bytes(codes.shape[-1], kind) - stored.shape[-1] - _SCALE_BYTES
  zeros = jnp.zeros((*stored.shape[:-1], free), jnp.uint8)
  rows = jnp.concatenate([stored, zeros, _bytes(scale)], axis=-1)
  return rows.reshape(len(rows), -1)


def _bytes(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint8)


def _codes(values, scale, kind):
  """Numbers [M, P, w] in units of the scale, rounded unless they are floats."""
  # A scale of 0 is that of zeros, or of what is too small to have one.
  ratio = values / jnp.where(scale == 0, 1, scale)[..., None]
  ratio = ratio if kind == 'float8' else jnp.round(ratio)
  return jnp.clip(ratio, -_LARGEST[kind], _LARGEST[kind])


def _clipped(values, largest):
  """The largest number [M, P] to keep of each part, for int4."""

  def error(clip):
    scale = clip * largest / _LARGEST['int4']
    decoded = _codes(values, scale, 'int4') * scale[..., None]
    return jnp.square(values - decoded).sum(-1)

  def better(best, clip):
    least, at = best
    found = error(clip)
    is_less = found < least
    best = jnp.where(is_less, found, least), jnp.where(is_less, clip, at)
    return best, None

  best = error(_CLIPS[0]), jnp.ones_like(largest)
  (_, clip), _ = jax.lax.scan(better, best, jnp.array(_CLIPS[1:], jnp.float32))
  return clip * largest


def decode_rows(
  stored: UInt8[Array, '*B S'],
  kind: str,
  width: int,
  parts: int = 1,
  scale: Float[Array, '*B P'] | None = None,
) -> Float[Array, '*B {width}']:
  """Numbers in f32 of rows as they are stored, see `codes_and_scales`."""
  codes, scale = codes_and_scales(stored, kind, width, parts, scale)
  values = codes.astype(jnp.float32) * scale[..., None, None]
  return values.reshape(*stored.shape[:-1], width)


def scales_apart(
  stored: UInt8[Array, 'M S'], kind: str, width: int, parts: int = 1
) -> tuple[UInt8[Array, 'M C'], Float[Array, 'M P']]:
  """The codes of rows without anything between them, and the scales."""
  _, scale = codes_and_scales(stored, kind, width, parts)
  in_parts = stored.reshape(len(stored), parts, -1)
  codes = in_parts[..., : code_bytes(width // parts, kind)]
  return codes.reshape(len(stored), -1), scale


def codes_and_scales(
  stored: UInt8[Array, '*B S'],
  kind: str,
  width: int,
  parts: int,
  scale: Float[Array, '*B P'] | None = None,
) -> tuple[Shaped[Array, '*B P h l'], Float[Array, '*B P']]:
  """Codes by part and block of l columns, of which int4 has two, and scales.

  Codes are integers of 32 bits, which all backends turn into floats fastest, or
  of float8 the numbers. With `scale` it is what `scales_apart` returns.
  """
  stored = stored.reshape(*stored.shape[:-1], parts, -1)
  if scale is None:
    last = stored[..., -_SCALE_BYTES:]
    scale = jax.lax.bitcast_convert_type(last, jnp.float32)
  codes = stored[..., None, : code_bytes(width // parts, kind)]
  if kind == 'float8':
    return _e4m3(codes), scale
  codes = _signed(codes).astype(jnp.int32)
  if kind == 'int4':
    # Each half to the top, and down again with its sign.
    shift = jnp.array([28, 24], jnp.int32)
    shift = shift.reshape((1,) * (codes.ndim - 2) + (2, 1))
    codes = (codes << shift) >> 28
  return codes, scale


def _e4m3(x: UInt8[Array, '*S']) -> Float[Array, '*S']:
  """The numbers, from their bits: XLA's CPU takes ten times as long."""
  x = x.astype(jnp.int32)
  exponent, mantissa = (x >> 3) & 15, x & 7
  mantissa = jnp.where(exponent == 0, mantissa, mantissa + 8)
  # Those without a leading one have the exponent of the least that has it.
  power = (jnp.maximum(exponent, 1) - 10 + 127) << 23
  size = mantissa.astype(jnp.float32) * jax.lax.bitcast_convert_type(
    power, jnp.float32
  )
  return jnp.where(x > 127, -size, size)


def _signed(x: UInt8[Array, '*S']) -> Int8[Array, '*S']:
  return jax.lax.bitcast_convert_type(x, jnp.int8)


def decode_rows_reference(
  stored: np.ndarray, kind: str, width: int, parts: int = 1
) -> np.ndarray:
  """`decode_rows` of uint8 [M, S], number by number."""
  decoded = []
  for row in stored:
    numbers = []
    for part in np.split(row, parts):
      scale = part[-_SCALE_BYTES:].view('<f4')[0]
      codes = part[: code_bytes(width // parts, kind)]
      if kind == 'int4':
        halves = [int(c) & 15 for c in codes] + [int(c) >> 4 for c in codes]
        values = [code - 16 if code > 7 else code for code in halves]
      elif kind == 'int8':
        values = [int(c) - 256 if c > 127 else int(c) for c in codes]
      else:
        values = codes.view(jnp.float8_e4m3fn).astype(np.float32)
      numbers += [np.float32(value) * scale for value in values]
    decoded.append(numbers)
  return np.array(decoded, np.float32)
