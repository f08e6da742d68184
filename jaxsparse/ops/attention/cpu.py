# SPDX-License-Identifier: Apache-2.0
"""Attention's forms for XLA's CPU, behind the names of the others.

Letters as in `compose`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from jaxsparse import mesh

# Rows from which attention in two parts is faster than all at once.
_SPLIT_ROWS = 64

# Rows of codes that become numbers at once: few enough for a core's cache, and
# a loop's steps cost little beside them.
_CODE_ROWS = 128


def wants_heads_first(num_rows: int) -> bool:
  """Whether [B, N, T, H] is the better order of heads before their products.

  A CPU's batched products want it, and copy what lies otherwise. Turned over
  before it is rotated, the copy is that of the rotation.
  """
  return mesh.platform() == 'cpu' and num_rows > 1


def leaves_out_later_keys(num_rows: int) -> bool:
  """Whether the first half of the rows is better served without the second.

  A quarter of all scores is then not made.
  """
  is_worth_it = num_rows >= _SPLIT_ROWS and num_rows % 2 == 0
  return mesh.platform() == 'cpu' and is_worth_it


def composes_faster(a: Float[Array, 'B T G M S']) -> bool:
  """Whether `compose` here is the faster form: on a CPU, of many queries."""
  num_heads = a.shape[2] * a.shape[3]
  return mesh.platform() == 'cpu' and a.shape[1] >= num_heads


def compose(
  a: Float[Array, 'B T G M S'],
  query: Float[Array, 'B T F G M'] | None,
  key: Float[Array, 'B S F G M'] | None,
  base: Float[Array, 'G M M'] | None,
) -> Float[Array, 'B T G M S']:
  """`compose_by_factors` by a matrix [M, M] of each token and group.

  Products of many of them are fast: training takes a quarter of the time.
  """
  # What is the same for all pairs joins the queries' matrices [B, T, G, M, M].
  matrix = jnp.eye(a.shape[3], dtype=a.dtype)[None, None, None]
  if base is not None:
    matrix = matrix + base[None, None]
  if query is not None:
    matrix = matrix + _matrices(*_parts(query))
  shape = (*a.shape[:-1], a.shape[3])
  heads = _squeeze_single_group(a)
  matrix = _squeeze_single_group(jnp.broadcast_to(matrix, shape))
  out = _by_queries(matrix, heads)
  if key is not None:
    out += _by_keys(key, heads)
  return out.reshape(a.shape)


def pad_off_cache_alias(num_keys: int) -> int:
  """How many keys of padding make composition faster on a CPU.

  There scores are turned over, and rows of a multiple of 1 kB would fall on the
  same lines of the cache.
  """
  is_slow = mesh.platform() == 'cpu' and num_keys % 256 == 0
  return 16 if is_slow else 0


def scores_in_parts(
  score: Callable[[jax.Array], jax.Array],
  codes: Int8[Array, 'B S K H'],
  num_queries: int,
) -> Float[Array, 'B _ _ _ S']:
  """`score(codes)` of few queries, on a CPU some rows at a time.

  XLA's CPU makes numbers of all codes before a product with any, four times
  their bytes. Parts of them stay in a core's cache. Of many queries, T G for
  each head, scores are more than numbers.
  """
  if not _is_in_parts(codes, num_queries):
    return score(codes)
  num_parts, begin = _parts_of_codes(codes)
  of_part = _part_reader(codes)
  scores = jax.lax.map(
    lambda i: score(of_part(i * _CODE_ROWS)), jnp.arange(num_parts)
  )
  scores = jnp.moveaxis(scores, 0, -2)
  scores = scores.reshape(*scores.shape[:-2], begin)
  if begin == codes.shape[1]:
    return scores
  return jnp.concatenate([scores, score(codes[:, begin:])], axis=-1)


def sums_in_parts(
  add_up: Callable[[jax.Array, jax.Array], jax.Array],
  weight: Float[Array, 'B _ _ _ S'],
  codes: Int8[Array, 'B S K H'],
  num_queries: int,
) -> Float[Array, 'B T K G H']:
  """`add_up(weight, codes)`, likewise, in f32 over the parts."""
  if not _is_in_parts(codes, num_queries):
    return add_up(weight, codes)
  num_parts, begin = _parts_of_codes(codes)
  of_part, dtype = _part_reader(codes), weight.dtype
  weight = weight.astype(jnp.promote_types(dtype, jnp.float32))

  def sums(i: Int[Array, ''] | int):
    rows = jax.lax.dynamic_slice_in_dim(
      weight, i * _CODE_ROWS, _CODE_ROWS, weight.ndim - 1
    )
    return add_up(rows, of_part(i * _CODE_ROWS))

  total = jax.lax.fori_loop(1, num_parts, lambda i, y: y + sums(i), sums(0))
  if begin < codes.shape[1]:
    total += add_up(weight[..., begin:], codes[:, begin:])
  return total.astype(dtype)


def _is_in_parts(codes: Int8[Array, 'B S K H'], num_queries: int):
  _, num_rows, _, width = codes.shape
  is_worth_it = num_rows > _CODE_ROWS and num_queries < width
  return mesh.platform() == 'cpu' and is_worth_it


def _parts_of_codes(codes: Int8[Array, 'B S K H']):
  """How many whole parts there are, and the row after them."""
  num_parts = codes.shape[1] // _CODE_ROWS
  return num_parts, num_parts * _CODE_ROWS


def _part_reader(codes: Int8[Array, 'B S K H']):
  # As a cache has them, where this undoes what its reader did: a loop would be
  # given a copy that is turned over.
  codes = jnp.moveaxis(codes, 1, 2)

  def read(begin: Int[Array, ''] | int):
    rows = jax.lax.dynamic_slice_in_dim(codes, begin, _CODE_ROWS, 2)
    return jnp.moveaxis(rows, 2, 1)

  return read


def _squeeze_single_group(x: Float[Array, 'B T G ...']):
  """Without G of [B, T, G, ...]: with it XLA's CPU products are slower."""
  return x[:, :, 0] if x.shape[2] == 1 else x


# Heads [B, T, (G,) M, S] by a matrix [(G,) M, N] of each query, or by one that
# the factors of each key make. Autodiff would multiply the other way around,
# and transpose all heads for it.


@jax.custom_vjp
def _by_queries(
  matrix: Float[Array, 'B T ... M N'], heads: Float[Array, 'B T ... M S']
):
  return jnp.einsum('bt...mn,bt...ms->bt...ns', matrix, heads)


def _save_by_queries(
  matrix: Float[Array, 'B T ... M N'], heads: Float[Array, 'B T ... M S']
):
  return _by_queries(matrix, heads), (matrix, heads)


def _restore_by_queries(
  inputs: tuple[jax.Array, jax.Array], cotangent: Float[Array, 'B T ... N S']
):
  matrix, heads = inputs
  return (
    jnp.einsum('bt...ms,bt...ns->bt...mn', heads, cotangent),
    jnp.einsum('bt...mn,bt...ns->bt...ms', matrix, cotangent),
  )


_by_queries.defvjp(_save_by_queries, _restore_by_queries)


@jax.custom_vjp
def _by_keys(
  factors: Float[Array, 'B S F G M'], heads: Float[Array, 'B T ... M S']
):
  # Turned over once, [B, S, (G,) M, T], as the gradient needs it again.
  heads = jnp.swapaxes(heads, 1, -1)
  out = _batched_matmul(_transposed_matrices(factors), heads)
  return jnp.swapaxes(out, 1, -1)


def _save_by_keys(
  factors: Float[Array, 'B S F G M'], heads: Float[Array, 'B T ... M S']
):
  return _by_keys(factors, heads), (factors, heads)


def _restore_by_keys(
  inputs: tuple[jax.Array, jax.Array], cotangent: Float[Array, 'B T ... N S']
):
  factors, heads = inputs
  heads = jnp.swapaxes(heads, 1, -1)
  # Once for both products, [B, S, (G,) T, N].
  cotangent = jnp.moveaxis(jnp.swapaxes(cotangent, 1, -1), -1, -2)
  of_heads = _batched_matmul(cotangent, _transposed_matrices(factors))
  read, write, _ = _parts(factors)
  group = factors.shape[-1]
  of_matrix = _batched_matmul(heads, cotangent)
  of_matrix = of_matrix.reshape(*factors.shape[:2], -1, group, group)
  # Matrices this small are never transposed, which takes as long as all else.
  of_read = sum(
    write[..., n, None] * of_matrix[:, :, None, ..., n] for n in range(group)
  )
  of_write = sum(
    read[..., m, None] * of_matrix[:, :, None, :, m] for m in range(group)
  )
  of_gate = jnp.diagonal(of_matrix, axis1=-2, axis2=-1)[:, :, None]
  return (
    jnp.concatenate([of_read, of_write, of_gate], axis=2),
    jnp.swapaxes(jnp.moveaxis(of_heads, -2, -1), 1, -1),
  )


_by_keys.defvjp(_save_by_keys, _restore_by_keys)


def _batched_matmul(
  left: Float[Array, '*batch l m'], right: Float[Array, '*batch m n']
):
  """By the order that XLA's CPU has: an einsum may exchange the sides."""
  batch = tuple(range(left.ndim - 2))
  dims = (((left.ndim - 1,), (left.ndim - 2,)), (batch, batch))
  return jax.lax.dot_general(left, right, dims)


def _parts(factors: Float[Array, 'B T F G M']):
  """[B, T, F, G, M]: what reads and what writes [B, T, r, G, M], the gates."""
  rank = factors.shape[2] // 2
  return factors[:, :, :rank], factors[:, :, rank:-1], factors[:, :, -1]


def _matrices(
  read: Float[Array, 'B T r G M'],
  write: Float[Array, 'B T r G M'],
  gate: Float[Array, 'B T G M'],
):
  """[B, T, G, M, N] from the parts of factors."""
  products = jnp.einsum('btrgm,btrgn->btgmn', read, write)
  diagonal = jnp.eye(gate.shape[-1], dtype=gate.dtype)
  return products + gate[..., None] * diagonal[None, None, None]


def _transposed_matrices(factors: Float[Array, 'B S F G M']):
  """[B, S, (G,) N, M]."""
  read, write, gate = _parts(factors)
  return _squeeze_single_group(_matrices(write, read, gate))
