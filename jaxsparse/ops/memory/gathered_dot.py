# SPDX-License-Identifier: Apache-2.0
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
from jaxsparse.ops.memory.value_bag_gradient import NumValid, Slots, Table
from jaxsparse.ops.shard_map_vma import match_vma
from jaxsparse.ops.tables.quantized_table import QuantizedTable


def gathered_dot(
  table: Float[Array, 'M W'] | QuantizedTable,
  slot: Int[Array, 'T k'],
  vector: Float[Array, 'T W'],
  *,
  num_valid: Int[Array, 'T'] | None = None,
  table_gradient: str = 'scatter',
) -> Float[Array, 'T k']:
  """The products, in f32 (f64 for f64 input).

  Args:
    table: rows to read, in range; they are not checked. A quantized one gets
      no gradient.
    slot: row of each of a token's k entries.
    vector: of each token.
    num_valid: how many of a token's entries count, from the first on; None for
      all. The others give zero.
    table_gradient: how rows are added to the table's gradient, see `value_bag`.
  """
  if num_valid is None:
    return _gathered_dot(*match_vma(table, slot, vector, None), table_gradient)
  in_use = jnp.arange(slot.shape[1])[None] < num_valid[:, None]
  slot = jnp.where(in_use, slot, 0)
  products = _gathered_dot(
    *match_vma(table, slot, vector, num_valid), table_gradient
  )
  return jnp.where(in_use, products, 0)


def gathered_dot_reference(
  table: Float[Array, 'M W'],
  slot: Int[Array, 'T k'],
  vector: Float[Array, 'T W'],
) -> Float[Array, 'T k']:
  """`gathered_dot` by gathering all rows."""
  return jnp.einsum('tkw,tw->tk', table[slot], vector)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gathered_dot(
  table: Table,
  slot: Slots,
  vector: Float[Array, 'T W'],
  num_valid: NumValid,
  table_gradient: str,
):
  dtype = chunking.accumulator(table, vector)
  # Only shape and type matter of the weights whose gradient this would be.
  weight = jnp.zeros((*slot.shape, 1), dtype)
  weight, _ = match_vma(weight, slot)
  products = gradient.weight_gradient(
    table, slot, weight, None, num_valid, vector[:, None]
  )
  return products[..., 0]


def _save(
  table: Table,
  slot: Slots,
  vector: Float[Array, 'T W'],
  num_valid: NumValid,
  table_gradient: str,
):
  products = _gathered_dot(table, slot, vector, num_valid, table_gradient)
  return products, (table, slot, vector, num_valid)


def _restore(
  table_gradient: str, inputs: tuple, cotangent: Float[Array, 'T k']
):
  table, slot, vector, num_valid = inputs
  weight = cotangent[..., None]
  d_vector = value_bag(table, slot, weight, num_valid=num_valid)[:, 0]
  d_table = None
  if not isinstance(table, QuantizedTable):
    d_table = gradient.table_gradient(
      table, slot, weight, None, num_valid, vector[:, None], table_gradient
    )
  return d_table, None, d_vector.astype(vector.dtype), None


_gathered_dot.defvjp(_save, _restore)
