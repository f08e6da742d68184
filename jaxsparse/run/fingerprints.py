# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: what is read is what was saved, bit for bit.

Arrays have one for each leaf, the same under every sharding. What JSON holds is
sealed: a digest of it stands beside it.
"""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of each leaf by its name: dtype with shape, and what its bits hash to.
Fingerprints = dict[str, list]


def of_arrays(tree: Any) -> Fingerprints:
  """The fingerprint of each leaf, as JSON gives it back."""
  # One after another: on a CPU one program of all would hold copies of all.
  hashes = [int(_hash(x)) for x in jax.tree.leaves(tree)]
  types = of_types(tree)
  return {
    name: [types[name], one] for name, one in zip(types, hashes, strict=True)
  }


def of_types(tree: Any) -> dict[str, str]:
  """Each leaf's dtype and shape by its name, in the order of the tree."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      f'{x.dtype}{list(x.shape)}'
    )
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def sums(tree: Any) -> list[int]:
  """As older checkpoints have them: the sum of each leaf's words."""
  return np.asarray(_sums(tree)).tolist()


def seal(content: dict) -> dict:
  """The content with a digest of it."""
  return content | {'digest': digest(content)}


def unseal(sealed: dict) -> dict:
  """What was sealed; older checkpoints have no digest.

  Raises:
    ValueError: it is no longer what was sealed.
  """
  content = {k: v for k, v in sealed.items() if k != 'digest'}
  if sealed.get('digest', digest(content)) != digest(content):
    raise ValueError('its record differs from the one that was saved')
  return content


def digest(content: Any) -> str:
  """SHA-256 of anything JSON can hold."""
  # As JSON reads it back: with strings for keys, which decide their order.
  plain = json.loads(json.dumps(content))
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@jax.jit
def _hash(x: jax.Array) -> jax.Array:
  """Sum modulo 2^32 of a hash of each word and its place.

  A hash of one word is a bijection: no change of a single word goes unnoticed.
  With the place hashed too, neither does an exchange of words. The bijection is
  the finalizer of MurmurHash3 (Appleby, 2011).
  """
  words = _words(x)
  place = jnp.uint32(0)
  for axis in range(words.ndim):
    stride = math.prod(words.shape[axis + 1 :]) % 2**32
    place += jnp.uint32(stride) * jax.lax.broadcasted_iota(
      jnp.uint32, words.shape, axis, out_sharding=jax.typeof(words).sharding
    )
  words ^= place * jnp.uint32(0x9E3779B1)
  words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
  words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


@jax.jit
def _sums(tree: Any) -> jax.Array:
  return jnp.stack(
    [jnp.sum(_words(x), dtype=jnp.uint32) for x in jax.tree.leaves(tree)]
  )


def _words(x: jax.Array) -> jax.Array:
  """The bits as uint32: of 8 bytes two, in a new last dimension."""
  bits = jnp.dtype(f'uint{8 * min(x.dtype.itemsize, 4)}')
  if x.dtype == bool:
    return x.astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
