# SPDX-License-Identifier: Apache-2.0
"""The two products of attention: scores of keys, and sums of values.

Keys and values may be quantized: their scales then go to the scores and to the
weights, which have no width. Letters as in `dense`; G query heads of each
key/value head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxsparse.ops.attention import cpu
from jaxsparse.ops.cpu import product
from jaxsparse.ops.quantized_rows import QuantizedRows, dtype_of_sums

# A product's own order is that of its batch, its left side and its right side.
# Asked for another, einsum has XLA multiply the other way around, for which its
# CPU copies both sides; turning what comes out costs less. For one query the
# other way around is the better one, as keys are then the left side.


def scores(
  query: Float[Array, 'B T K G H'],
  key: Float[Array, 'B S K H'] | QuantizedRows,
  is_composed: bool,
  dtype: jax.typing.DTypeLike,
):
  """[B, K, G, T, S], or [B, T, K, G, S]: composition wants a query's heads."""
  if isinstance(key, QuantizedRows):

    def of_codes(codes: Int8[Array, 'B S K H']):
      return scores(query, codes.astype(query.dtype), is_composed, dtype)

    num_queries = query.shape[1] * query.shape[3]
    score = cpu.scores_in_parts(of_codes, key.codes, num_queries)
    return score * _beside_scores(key.scale, is_composed)
  order = 'btkgs' if is_composed else 'bkgts'
  if query.shape[1] == 1:
    letters = f'btkgh,bskh->{order}'
  elif is_composed:
    letters = 'btkgh,bskh->bktgs'
  else:
    query, key = jnp.moveaxis(query, 1, 3), jnp.moveaxis(key, 1, 2)
    if query.dtype == dtype:
      return product('bkgth,bksh->bkgts', query, key)
    letters = 'bkgth,bksh->bkgts'
  score = jnp.einsum(letters, query, key, preferred_element_type=dtype)
  return jnp.moveaxis(score, 1, 2) if letters.endswith('bktgs') else score


def sums(
  weight: Float[Array, 'B _ _ _ S'],
  value: Float[Array, 'B S K H'] | QuantizedRows,
  is_composed: bool,
  dtype: jax.typing.DTypeLike,
):
  """Weights in the order of `scores` to sums [B, T, K, G, H]."""
  if isinstance(value, QuantizedRows):

    def of_codes(
      weight: Float[Array, 'B _ _ _ S'], codes: Int8[Array, 'B S K H']
    ):
      codes = codes.astype(weight.dtype)
      return sums(weight, codes, is_composed, weight.dtype)

    weight *= _beside_scores(value.scale, is_composed)
    weight = weight.astype(dtype_of_sums(dtype))
    batch, num_rows, num_heads, _ = value.shape
    num_queries = weight.size // (batch * num_rows * num_heads)
    total = cpu.sums_in_parts(of_codes, weight, value.codes, num_queries)
    return total.astype(dtype)
  weight = weight.astype(value.dtype)
  if is_composed:
    return jnp.moveaxis(jnp.einsum('btkgs,bskh->bktgh', weight, value), 2, 1)
  value = jnp.moveaxis(value, 1, 2)
  return jnp.moveaxis(product('bkgts,bksh->bkgth', weight, value), 3, 1)


def _beside_scores(scale: Float[Array, 'B S K'], is_composed: bool):
  """Of each key and head, to be broadcast over scores."""
  scale = jnp.moveaxis(scale, 1, 2)
  if is_composed:
    return scale[:, None, :, None]
  return scale[:, :, None, None]
