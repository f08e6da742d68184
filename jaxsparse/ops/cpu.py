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

# Of `bisect_top_k`: rows from which it pays, the candidates from which it does,
# for each that is selected at least so many, rows at once, and a group's size.
_BISECTED_ROWS, _BISECTED_CANDIDATES, _BISECTED_SHARE = 128, 512, 16
_BISECTED_TILE, _GROUP = 64, 8


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


def bisects_faster(rows: Float[Array, 'T Q'], num_selected: int) -> bool:
  """Whether `bisect_top_k` is the faster form: of many rows, few of many."""
  least = max(_BISECTED_CANDIDATES, _BISECTED_SHARE * num_selected)
  is_wide = rows.shape[1] >= least
  return rows.dtype == jnp.float32 and len(rows) >= _BISECTED_ROWS and is_wide


def bisect_top_k(
  rows: Float[Array, 'T Q'], num_selected: int
) -> tuple[Float[Array, 'T k'], Int[Array, 'T k']]:
  """`lax.top_k`, with its stable order: first of groups, then of their members.

  The best k are in the k groups with the largest maxima, of which the earlier
  ones count first. Either stage finds the k-th largest bit by bit, by counting.
  XLA's CPU sorts row by row: this takes 0.65 of its time for 32 of 1,106
  candidates (JAX 0.10.2).
  """

  def best(carry: None, tile: Float[Array, 't Q']):
    return carry, _bisected_tile(tile, num_selected)

  _, indices = chunking.scan_tokens(
    best, None, jax.lax.stop_gradient(rows), _BISECTED_TILE
  )
  return jnp.take_along_axis(rows, indices, axis=-1), indices


def _bisected_tile(rows: Float[Array, 't Q'], num_selected: int):
  num_rows, num_candidates = rows.shape
  num_groups = -(-num_candidates // _GROUP)
  # None of what fills the last group up is before a candidate.
  groups = jnp.pad(
    rows,
    ((0, 0), (0, num_groups * _GROUP - num_candidates)),
    constant_values=-jnp.inf,
  ).reshape(num_rows, num_groups, _GROUP)
  group = _best_places(groups.max(-1).T, num_selected).T
  members = jax.vmap(lambda x, i: x.at[i].get(mode='promise_in_bounds'))(
    groups, group
  ).reshape(num_rows, -1)
  place = _best_places(members.T, num_selected).T

  def take(x: Array, i: Int[Array, 't k']):
    return jnp.take_along_axis(x, i, axis=1, mode='promise_in_bounds')

  index = take(group, place // _GROUP) * _GROUP + place % _GROUP
  return take(index, _counted_tile(take(members, place), num_selected))


def _best_places(columns: Float[Array, 'Q t'], num_selected: int):
  """Positions of each column's largest numbers [k, t], in ascending order."""
  bits = jax.lax.bitcast_convert_type(columns, jnp.int32)
  # In the order of the numbers.
  order = bits ^ ((bits >> 31) & jnp.int32(2**31 - 1))
  zeros = chunking.zeros((columns.shape[1],), jnp.int32, columns)

  def add_bit(i: Int[Array, ''], least: Int[Array, 't']):
    # The first of them makes the lowest number 0.
    higher = least + jax.lax.shift_left(jnp.int32(1), 31 - i)
    count = (order >= higher[None]).astype(jnp.int32).sum(0)
    return jnp.where(count >= num_selected, higher, least)

  least = jax.lax.fori_loop(0, 32, add_bit, zeros + jnp.int32(-(2**31)))
  # Of those that equal the last one, the first.
  num_equal = num_selected - (order > least[None]).astype(jnp.int32).sum(0)
  wanted = jnp.arange(num_selected, dtype=jnp.int32)[:, None]

  def put(i: Int[Array, ''], state: tuple[jax.Array, ...]):
    found, num_found, num_seen = state
    row = jax.lax.dynamic_index_in_dim(order, i, keepdims=False)
    is_equal = row == least
    is_one = (row > least) | (is_equal & (num_seen < num_equal))
    at = jnp.where(is_one, num_found, -1)
    return (
      jnp.where(at[None] == wanted, i, found).astype(jnp.int32),
      num_found + is_one.astype(jnp.int32),
      num_seen + is_equal.astype(jnp.int32),
    )

  found = chunking.zeros((num_selected, columns.shape[1]), jnp.int32, columns)
  return jax.lax.fori_loop(0, len(order), put, (found, zeros, zeros), unroll=4)[
    0
  ]
