# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of rows that are sums, and so follow the rows that change.

The fingerprint of a stripe of rows is the sum modulo 2^32 of a hash of each
word and its place. A word of zero counts nothing, so that of a hole is 0.
Replacing some rows changes it by the hashes of the new less those of the old:
it costs no reading of the others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32


def row_hashes(
  rows: Shaped[Array, 'n ...'], number: UInt32[Array, 'n']
) -> UInt32[Array, 'n']:
  """The hash of each row.

  Args:
    rows: of a table, of values of at most 32 bits.
    number: of each row in its table.
  """
  return row_hash_changes(rows, jnp.zeros_like(rows), number)


def row_hash_changes(
  new: Shaped[Array, 'n ...'],
  old: Shaped[Array, 'n ...'],
  number: UInt32[Array, 'n'],
) -> UInt32[Array, 'n']:
  """`row_hashes` of new rows less those of the old ones in their places."""
  new, old = _words(new), _words(old)
  place = number[:, None] * jnp.uint32(new.shape[1])
  place += jnp.arange(new.shape[1], dtype=jnp.uint32)[None]
  place *= jnp.uint32(0x9E3779B1)
  # That of a zero, which is to be none, has been taken off both.
  change = _mixed(new ^ place) - _mixed(old ^ place)
  return jnp.sum(change, axis=1, dtype=jnp.uint32)


def _words(rows):
  bits = jnp.dtype(f'uint{8 * rows.dtype.itemsize}')
  words = jax.lax.bitcast_convert_type(rows, bits).astype(jnp.uint32)
  return words.reshape(len(rows), -1)


def _mixed(x):
  """A bijection, by a constant of MurmurHash3 (Appleby, 2011)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  return x ^ (x >> 13)
