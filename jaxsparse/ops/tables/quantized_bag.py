# SPDX-License-Identifier: Apache-2.0
"""Bags of a quantized table's rows, for XLA's CPU.

Codes are summed as they are, times a weight that has the row's scale in it, in
one loop for both halves of int4 rows. The stored rows of a chunk of entries are
gathered before: fused with the sums, each would be read twice, and its scale by
itself (262,144 x 256, 8,192 reads: 1.36 times an f32 bag's time, and 0.7 so).

Letters as in `value_bag`; P parts of a row, h blocks of l columns in each, for
each of which a weight counts.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import chunking
from jaxsparse.ops.tables.quantized_table import QuantizedTable

# Entries whose rows are gathered at once, to be still in the cache.
_ENTRIES = 8


def one_pool_bag(
  table: QuantizedTable,
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  num_valid: Int[Array, 'T'] | None,
) -> Float[Array, 'T 1 W']:
  """`value_bag` of a table in rows of `row_format`, with one pool."""
  dtype = chunking.accumulator(table, weight)
  num_tokens, width = len(slot), table.shape[1]
  num_cores, parts = weight.shape[2], table.num_own_parts
  halves = 2 if table.kind == 'int4' else 1
  # So short that each has the weight of one core: spread over all columns, it
  # would take twice as long.
  num_blocks = math.lcm(num_cores, parts * halves)
  shape = (num_tokens, parts, num_blocks // parts, width // num_blocks)

  def add(pooled: Float[Array, 'T P h l'], entries: tuple):
    slot, weight = entries
    codes, scale = table.read_codes(lambda x: chunking.rows(x, slot))
    weight = jnp.repeat(weight, num_blocks // num_cores, axis=2)
    factor = weight.reshape(*slot.shape, *shape[1:3]) * scale[..., None]
    codes = codes.reshape(*slot.shape, *shape[1:])
    for j in range(slot.shape[1]):
      pooled += factor[:, j, ..., None] * codes[:, j].astype(dtype)
    return pooled, None

  pooled, _ = chunking.scan_entries(
    add,
    chunking.zeros(shape, dtype, table, slot),
    (slot, weight.astype(dtype)),
    num_valid,
    _ENTRIES,
  )
  return pooled.reshape(num_tokens, 1, width)
