# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of rows that are sums, and so follow the rows that change.

The fingerprint of a stripe of rows is the sum modulo 2^32 of a hash of each
word and its place. A word of zero counts nothing, so that of a hole is 0.
Replacing some rows changes it by the hashes of the new less those of the old:
it costs no reading of the others.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32


def row_hashes(
  rows: Shaped[Array, 'n ...'], number: UInt32[Array, 'n']
) -> UInt32[Array, 'n']:
  """The hash of each row.

  Args:
    rows: of a table, of values of at most 32 bits.
    number: of each row in its table.
  """
  words = _words(rows)
  place = number[:, None] * jnp.uint32(words.shape[1])
  place += jnp.arange(words.shape[1], dtype=jnp.uint32)[None]
  place *= jnp.uint32(0x9E3779B1)
  # A zero is to be none.
  hashes = _mixed(words ^ place) - _mixed(place)
  return jnp.sum(hashes, axis=1, dtype=jnp.uint32)


def _words(rows):
  bits = jnp.dtype(f'uint{8 * rows.dtype.itemsize}')
  words = jax.lax.bitcast_convert_type(rows, bits).astype(jnp.uint32)
  return words.reshape(len(rows), -1)


def _mixed(x):
  """A bijection, by a constant of MurmurHash3 (Appleby, 2011)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  return x ^ (x >> 13)


def hashes_of(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """`row_hashes` of rows by their numbers, compiled for few lengths."""
  size = 1 << max(len(rows) - 1, 1).bit_length()
  padded = np.zeros((size, *rows.shape[1:]), rows.dtype)
  padded[: len(rows)] = rows
  number = np.zeros(size, np.uint32)
  number[: len(rows)] = ids
  return np.asarray(_compiled()(padded, number))[: len(rows)]


@functools.cache
def _compiled() -> Any:
  return jax.jit(row_hashes)
