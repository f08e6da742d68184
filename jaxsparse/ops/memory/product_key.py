# SPDX-License-Identifier: Apache-2.0
"""Exact retrieval with additive product keys (arXiv:1907.05242, section 3.1).

A slot is a cell (i, j) of a grid of Q x Q logical keys and scores
row[i] + column[j]. Sort both axes in descending order: a cell at positions
(i, j), counted from 1, has i * j - 1 others before it that score at least as
much. So only cells with i * j <= k can be among the best k: 119 candidates
instead of 1,024 for k = 32, and no cell is missed. This holds for sums only,
not for the bilinear scores of `tucker`.

Letters: T tokens, P memory heads, Q keys per axis, k kept cells per head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsparse.ops.top_k import top_m, top_m_reference


def product_key_top_m(
  row: Float[Array, 'T P Q'],
  column: Float[Array, 'T P Q'],
  num_selected: int,
  *,
  is_stable: bool = False,
) -> tuple[Float[Array, 'T P k'], Int[Array, 'T P k']]:
  """Scores and addresses of the best cells of each head.

  Gradients flow through the scores of the kept cells; the selection has none.

  Args:
    row: scores of the row keys, f32 or f64.
    column: scores of the column keys.
    num_selected: cells kept per head, at most Q.
    is_stable: see `top_m`.

  Returns:
    The scores, best first, and the addresses i * Q + j (int32, or uint32 where
    Q^2 does not fit).
  """
  num_keys = row.shape[-1]
  best = functools.partial(
    top_m, num_selected=num_selected, is_stable=is_stable
  )
  best_row, i = best(jax.lax.stop_gradient(row))
  best_column, j = best(jax.lax.stop_gradient(column))
  p, q = candidates(num_selected)
  sums = best_row[..., p] + best_column[..., q]
  _, cell = best(sums)
  i = jnp.take_along_axis(i, jnp.asarray(p)[cell], axis=-1)
  j = jnp.take_along_axis(j, jnp.asarray(q)[cell], axis=-1)
  scores = jnp.take_along_axis(row, i, axis=-1) + jnp.take_along_axis(
    column, j, axis=-1
  )
  dtype = jnp.int32 if num_keys**2 <= 2**31 else jnp.uint32
  return scores, i.astype(dtype) * jnp.asarray(num_keys, dtype) + j.astype(
    dtype
  )


def candidates(num_selected: int) -> tuple[np.ndarray, np.ndarray]:
  """Positions (i, j), from 0, of the cells that can be among the best k."""
  positions = np.arange(1, num_selected + 1)
  i, j = np.nonzero(positions[:, None] * positions[None] <= num_selected)
  return i.astype(np.int32), j.astype(np.int32)


def product_key_top_m_reference(
  row: Float[Array, 'T P Q'],
  column: Float[Array, 'T P Q'],
  num_selected: int,
) -> tuple[Float[Array, 'T P k'], Int[Array, 'T P k']]:
  """`product_key_top_m` by scoring all cells."""
  grid = row[..., :, None] + column[..., None, :]
  return top_m_reference(grid.reshape(*grid.shape[:2], -1), num_selected)
