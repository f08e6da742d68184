"""Dense causal attention with grouped heads and document masks.

Two matmuls and a softmax, written out: `jax.nn.dot_product_attention` does the
same on every platform unless asked for cuDNN, which takes no float32, and its
bfloat16 matmul has no CPU implementation at some shapes (JAX 0.10.2).

The softmax is that of Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; heads are
grouped as in GQA (Ainslie et al. 2023, arXiv:2305.13245).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse import mesh


def document_mask(
  query_positions: Int[Array, 'B T'],
  key_positions: Int[Array, 'B S'],
  query_segments: Int[Array, 'B T'],
  key_segments: Int[Array, 'B S'],
) -> Bool[Array, 'B T S']:
  """True where a query sees a key: same document, not later, no padding.

  Segment 0 is padding: it sees nothing and nobody sees it.
  """
  is_same = query_segments[:, :, None] == key_segments[:, None, :]
  is_past = key_positions[:, None, :] <= query_positions[:, :, None]
  return is_same & is_past & (key_segments > 0)[:, None, :]


def attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  query_positions: Int[Array, 'B T'],
  key_positions: Int[Array, 'B S'],
  query_segments: Int[Array, 'B T'],
  key_segments: Int[Array, 'B S'],
) -> Float[Array, 'B T N H']:
  """Softmax attention within documents, over keys at positions up to one's own.

  Args:
    query: N heads; head n reads key/value head n // (N / K).
    key: K heads, already rotated.
    value: as `key`.
    query_positions: position of each query in its document.
    key_positions: position of each key in its document.
    query_segments: document of each query; 0 for padding.
    key_segments: document of each key; 0 for padding and for unused cache.

  Returns:
    The mean of the values, softmax in float32; zero for queries that see no
    key, such as padding.
  """
  B, T, N, H = query.shape
  K = key.shape[2]
  # With one key/value head `model` (of length 1) would go to its group.
  query = query.reshape(B, T, K, N // K, H, out_sharding=mesh.act('BTKGH'))
  score = jnp.einsum(
    'btkgh,bskh->bkgts', query, key, preferred_element_type=jnp.float32
  )
  mask_BTS = document_mask(
    query_positions, key_positions, query_segments, key_segments
  )
  # A finite bound: with -inf a query that sees no key would give NaN.
  bound = jnp.finfo(jnp.float32).min
  score = jnp.where(mask_BTS[:, None, None], score * H**-0.5, bound)
  weight = jax.nn.softmax(score, axis=-1).astype(value.dtype)
  encoded = jnp.einsum('bkgts,bskh->btkgh', weight, value)
  encoded = encoded.reshape(B, T, N, H, out_sharding=mesh.act('BTNH'))
  sees_any = mask_BTS.any(axis=-1)[:, :, None, None]
  return jnp.where(sees_any, encoded, jnp.zeros_like(encoded))


def attention_reference(
  query,
  key,
  value,
  query_positions,
  key_positions,
  query_segments,
  key_segments,
):
  """The definition, with every head's keys written out; tests only."""
  num_groups = query.shape[2] // key.shape[2]
  key = jnp.repeat(key, num_groups, axis=2).astype(jnp.float32)
  value = jnp.repeat(value, num_groups, axis=2).astype(jnp.float32)
  score = jnp.einsum('btnh,bsnh->bnts', query.astype(jnp.float32), key)
  mask = document_mask(
    query_positions, key_positions, query_segments, key_segments
  )[:, None]
  weight = jnp.where(mask, jnp.exp(score * query.shape[-1] ** -0.5), 0.0)
  total = weight.sum(axis=-1, keepdims=True)
  weight = weight / jnp.where(total > 0, total, 1.0)
  return jnp.einsum('bnts,bsnh->btnh', weight, value).astype(query.dtype)
