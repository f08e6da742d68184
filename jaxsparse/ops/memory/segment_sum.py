# SPDX-License-Identifier: Apache-2.0
"""References to rows of a table, and what they add to its gradient.

Reference number t * k + j is entry j of token t, which reads a row, with one
weight for each core, for one of the token's pools.

Letters: T tokens, k entries, c cores, E pools, W row width, n references.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.chunking import rows

# References that a GPU sums at once in a fixed order.
REFERENCES_GPU = 2**14


def updates_at(
  position: Int[Array, 'n'],
  weight: Float[Array, 'T k c'],
  pool: Int[Array, 'T k'] | None,
  cotangent_TEW: Float[Array, 'T E W'],
  dtype: jax.typing.DTypeLike,
):
  """Outer products [n, W] of the references at `position`."""
  num_entries, num_cores = weight.shape[1:]
  token = position // num_entries
  pool = 0 if pool is None else rows(pool.reshape(-1), position)
  num_pools, width = cotangent_TEW.shape[1:]
  pooled = rows(cotangent_TEW.reshape(-1, width), token * num_pools + pool)
  weight = rows(weight.reshape(-1, num_cores), position)
  update = weight.astype(dtype)[..., None] * pooled.astype(dtype).reshape(
    *position.shape, num_cores, -1
  )
  return update.reshape(-1, width)


def sum_equal_rows(
  row: Int[Array, 'n'], update: Float[Array, 'n W'], num_rows: int
):
  """Sorted references with those of one row summed up: rows are distinct.

  The sum is a tree over each run of equal rows: in pass i a reference takes
  what the one 2^i before it holds, if that is of the same row, and the last of
  a run ends up with all of it. The others get rows out of range, each its own.
  """
  size = len(row)
  for i in range(math.ceil(math.log2(size))):
    before = jnp.pad(row[: -(2**i)], (2**i, 0), constant_values=-1)
    held = jnp.pad(update[: -(2**i)], ((2**i, 0), (0, 0)))
    update += jnp.where((row == before)[:, None], held, 0)
  is_last = row != jnp.append(row[1:], -1)
  out_of_range = num_rows + jnp.arange(size, dtype=row.dtype)
  return jnp.where(is_last & (row < num_rows), row, out_of_range), update
