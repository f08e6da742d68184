"""Inner products of a token's vector with the rows that the token reads.

  out[t, j] = vector[t] . table[slot[t, j]]

The pre-values of UltraMemV2 (arXiv:2508.18756) and the input side of PEER's
one-neuron experts (arXiv:2407.04153): what they give, or an activation of it,
scales the weights of a bag over a second table. Products are to a bag what its
score gradient is, so both share their code, and neither keeps the rows.

Letters: M rows, W row width, T tokens, k rows per token.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import chunking
from jaxsparse.ops.memory import value_bag_gradient as gradient
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.ops.memory.value_bag_gradient import NumUsed, Slots, Table
from jaxsparse.ops.shard_map_vma import to_same_varying


def row_products(
  table: Float[Array, 'M W'],
  slot: Int[Array, 'T k'],
  vector: Float[Array, 'T W'],
  *,
  num_used: Int[Array, 'T'] | None = None,
  table_gradient: str = 'scatter',
) -> Float[Array, 'T k']:
  """The products, in f32 (f64 for f64 input).

  Args:
    table: rows to read, in range; they are not checked.
    slot: row of each of a token's k entries.
    vector: of each token.
    num_used: how many of a token's entries count, from the first on; None for
      all. The others give zero.
    table_gradient: how rows are added to the table's gradient, see `value_bag`.
  """
  if num_used is None:
    return _row_products(
      *to_same_varying(table, slot, vector, None), table_gradient
    )
  in_use = jnp.arange(slot.shape[1])[None] < num_used[:, None]
  slot = jnp.where(in_use, slot, 0)
  products = _row_products(
    *to_same_varying(table, slot, vector, num_used), table_gradient
  )
  return jnp.where(in_use, products, 0)


def row_products_reference(
  table: Float[Array, 'M W'],
  slot: Int[Array, 'T k'],
  vector: Float[Array, 'T W'],
) -> Float[Array, 'T k']:
  """`row_products` by gathering all rows."""
  return jnp.einsum('tkw,tw->tk', table[slot], vector)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _row_products(
  table: Table,
  slot: Slots,
  vector: Float[Array, 'T W'],
  num_used: NumUsed,
  table_gradient: str,
):
  dtype = chunking.accumulator(table, vector)
  # Only shape and type matter of the weights whose gradient this would be.
  weight = jnp.zeros((*slot.shape, 1), dtype)
  weight, _ = to_same_varying(weight, slot)
  products = gradient.of_weight(
    table, slot, weight, None, num_used, vector[:, None]
  )
  return products[..., 0]


def _save(
  table: Table,
  slot: Slots,
  vector: Float[Array, 'T W'],
  num_used: NumUsed,
  table_gradient: str,
):
  products = _row_products(table, slot, vector, num_used, table_gradient)
  return products, (table, slot, vector, num_used)


def _restore(
  table_gradient: str, inputs: tuple, cotangent: Float[Array, 'T k']
):
  table, slot, vector, num_used = inputs
  weight = cotangent[..., None]
  d_vector = value_bag(table, slot, weight, num_used=num_used)[:, 0]
  d_table = gradient.of_table(
    table, slot, weight, None, num_used, vector[:, None], table_gradient
  )
  return d_table, None, d_vector.astype(vector.dtype), None


_row_products.defvjp(_save, _restore)
