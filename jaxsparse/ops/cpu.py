# SPDX-License-Identifier: Apache-2.0
"""Forms for XLA's CPU that several ops share, behind the names of the others.

Each dispatches by itself, or is one branch of `jax.lax.platform_dependent`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.ops import chunking
from jaxsparse.ops.shard_map_vma import match_vma

# Rows from which counting pays, the candidates up to which it does, and the
# rows that are counted at once: their positions should stay in a core's cache.
_COUNTED_ROWS, _COUNTED_CANDIDATES, _TILE_ROWS = 512, 96, 256


def row_sums(x: Float[Array, '*B S'], letters: str = '...s,s->...') -> Array:
  """Sums over the last axis of what was just computed, [*B].

  By a matmul on a CPU: XLA's sum there computes its terms once more, and one of
  a product takes four times as long as all the rest of a softmax (JAX 0.10.2).

  Args:
    x: terms.
    letters: of the einsum with ones that is a matmul. If it is batched as
      another one is, `x` is laid out for both at once.
  """
  left, right = letters.split('->')[0].split(',')
  ones = jnp.ones([x.shape[left.index(i) - len(left)] for i in right], x.dtype)
  return jax.lax.platform_dependent(
    x,
    ones,
    cpu=lambda x, ones: jnp.einsum(letters, x, ones),
    default=lambda x, ones: x.sum(-1),
  )


def computed_once(x: Float[Array, '*B S']) -> Float[Array, '*B S']:
  """`x`, on a CPU by a product with the identity.

  XLA's CPU computes what is dear again for each of its users, and for each copy
  that a broadcast makes, even behind `optimization_barrier` (JAX 0.10.2): a
  product alone is stored. Rotating queries and keys takes half of the time.
  """
  identity = jnp.eye(x.shape[-1], dtype=x.dtype)
  return jax.lax.platform_dependent(
    x,
    identity,
    cpu=lambda x, identity: jnp.einsum('...s,st->...t', x, identity),
    default=lambda x, identity: x,
  )


def product(
  letters: str, left: Float[Array, '...'], right: Float[Array, '...']
) -> Float[Array, '...']:
  """`jnp.einsum` whose right side's gradient turns over the smaller array.

  That gradient is a product of the result's gradient and the left side. JAX has
  the former first, and XLA's CPU turns over what is first: scores of all keys,
  for one, take longer to turn over than to multiply.
  """
  if mesh.platform() != 'cpu':
    return jnp.einsum(letters, left, right)
  # Where one side varies over devices alone, the other's gradient is a sum.
  return _product(letters, *match_vma(left, right))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(letters, left, right):
  return jnp.einsum(letters, left, right)


def _gradients(letters, sides, cotangent):
  left, right = sides
  inputs, out = letters.split('->')
  of_left, of_right = inputs.split(',')
  d_left = jnp.einsum(f'{out},{of_right}->{of_left}', cotangent, right)
  pair = sorted([(left, of_left), (cotangent, out)], key=lambda x: x[0].size)
  (first, of_first), (second, of_second) = pair
  # The order in which a product leaves them: of both, of the first, the rest.
  kept = [
    [i for i in of if i in of_right and (i in other) == is_shared]
    for of, other, is_shared in (
      (of_first, of_second, True),
      (of_first, of_second, False),
      (of_second, of_first, False),
    )
  ]
  order = [i for letters in kept for i in letters]
  d_right = jnp.einsum(
    f'{of_first},{of_second}->{"".join(order)}', first, second
  )
  return d_left, d_right.transpose([order.index(i) for i in of_right])


_product.defvjp(
  lambda letters, left, right: (_product(letters, left, right), (left, right)),
  _gradients,
)


def counts_faster(rows: Float[Array, 'T Q'], num_selected: int) -> bool:
  """Whether `count_top_k` is the faster form: of many rows, each of few."""
  return (
    len(rows) >= _COUNTED_ROWS
    and num_selected <= rows.shape[1] <= _COUNTED_CANDIDATES
  )


def count_top_k(
  rows: Float[Array, 'T Q'], num_selected: int
) -> tuple[Float[Array, 'T k'], Int[Array, 'T k']]:
  """`lax.top_k`, with its stable order: a position counts the others before.

  XLA's CPU sorts row by row through a comparator, which takes longer than
  counting, for many rows at once, how many beat each: 1.5 times as long for 32
  of 88 candidates (2,048 rows, JAX 0.10.2), but 0.6 times for 16 of 128, as
  counting grows with the square of their number.
  """

  def count(carry: None, tile: Float[Array, 't Q']):
    return carry, _counted_tile(tile, num_selected)

  _, indices = chunking.scan_tokens(
    count, None, jax.lax.stop_gradient(rows), _TILE_ROWS
  )
  return jnp.take_along_axis(rows, indices, axis=-1), indices


def _counted_tile(rows: Float[Array, 't Q'], num_selected: int):
  # Rows last: every step is then a whole vector of them.
  columns = rows.T
  index = jnp.arange(len(columns), dtype=jnp.int32)[:, None]
  place = jnp.arange(num_selected, dtype=jnp.int32)[:, None]

  def count(i: Int[Array, ''], positions: Int[Array, 'Q t']):
    other = jax.lax.dynamic_slice_in_dim(columns, i, 1)
    is_before = (other > columns) | ((other == columns) & (i < index))
    return positions + is_before.astype(jnp.int32)

  def put(i: Int[Array, ''], found: Int[Array, 'k t']):
    position = jax.lax.dynamic_slice_in_dim(positions, i, 1)
    return found + jnp.where(position == place, i, 0).astype(jnp.int32)

  def over_candidates(body: Callable, num_rows: int):
    start = chunking.zeros((num_rows, len(rows)), jnp.int32, rows)
    return jax.lax.fori_loop(0, len(columns), body, start, unroll=4)

  positions = over_candidates(count, len(columns))
  # NaNs beat no score: several of them have position 0.
  return jnp.minimum(over_candidates(put, num_selected).T, len(columns) - 1)
