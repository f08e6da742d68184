# SPDX-License-Identifier: Apache-2.0
"""Tensor-decomposed query-key retrieval (TDQKR) of UltraMem.

arXiv:2411.12364, section 3. A slot is a cell (i, j) of a grid of Q x Q logical
keys. Each axis scores its keys in r ranks, and a small core C binds the two:

  score[i, j] = row[i] @ C @ column[j]

Scoring Q^2 cells is out of the question, so a rank-1 stand-in for the core
picks m rows and m columns, and only their m x m cells are scored in full.
With c cores a cell has c scores; their sum decides which cells are kept.

Letters: T tokens, P memory heads, Q keys per axis, r ranks, c cores, m
candidates per axis, k kept cells per head (k = m here).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import chunking
from jaxsparse.ops.top_k import top_m, top_m_reference

Directions = tuple[Float[Array, 'P r'], Float[Array, 'P r']]

# Cells that are scored at once. More tokens than that go tile by tile, so the
# grids of a long batch never stand in memory together.
_TILE_CELLS = 2**24


def tucker_top_m(
  row: Float[Array, 'T P Q r'],
  column: Float[Array, 'T P Q r'],
  cores: Float[Array, 'c P r r'],
  num_selected: int,
  *,
  directions: Directions | None = None,
  two_quadrants: bool = False,
  is_stable: bool = False,
) -> tuple[Float[Array, 'T P k c'], Int[Array, 'T P k']]:
  """Scores and addresses of the kept cells of each head.

  Gradients flow through the scores of the kept cells into `row`, `column` and
  `cores`; the selection, and with it the directions, has none. What the
  backward pass keeps is the size of the kept cells, never of the grid.

  The pre-filter looks at one quadrant of the grid, and finds about half of the
  true best cells: most others are products of two very negative scores.
  `two_quadrants` spends the same m on both signs, m/2 rows and columns each;
  recall rises above 0.95, but it is another model than the published one.

  Args:
    row: rank scores of the row keys, f32 or f64.
    column: rank scores of the column keys.
    cores: one r x r core for each of c scores and each head.
    num_selected: candidates per axis, and cells kept per head.
    directions: left and right vectors of the pre-filter; by default the
      leading singular pair of the summed cores.
    two_quadrants: candidates from both same-sign quadrants.
    is_stable: see `top_m`.

  Returns:
    The c scores of each kept cell, best sum first, and its address i * Q + j
    (int32, or uint32 where Q^2 does not fit).
  """
  num_keys = row.shape[2]
  core_sum_Prr = jax.lax.stop_gradient(cores.sum(0))
  if directions is None:
    directions = leading_directions(core_sum_Prr)
  i_TPk, j_TPk = _select(
    jax.lax.stop_gradient(row),
    jax.lax.stop_gradient(column),
    core_sum_Prr,
    jax.lax.stop_gradient(directions),
    functools.partial(top_m, is_stable=is_stable),
    num_selected,
    2 if two_quadrants else 1,
  )
  row_TPkr, column_TPkr = _take(row, i_TPk), _take(column, j_TPk)
  scores_TPkc = _cell_scores(row_TPkr, column_TPkr, cores)
  dtype = jnp.int32 if num_keys**2 <= 2**31 else jnp.uint32
  address_TPk = i_TPk.astype(dtype) * jnp.asarray(num_keys, dtype)
  return scores_TPkc, address_TPk + j_TPk.astype(dtype)


def _cell_scores(
  row: Float[Array, 'T P k r'],
  column: Float[Array, 'T P k r'],
  cores: Float[Array, 'c P r r'],
):
  """row[T, P, k] @ C[c, P] @ column[T, P, k], [T, P, k, c].

  Unrolled over ranks and cores: sums that short, and those of their gradients,
  are no matter for a GPU's matmuls or a CPU's reductions.
  """
  num_cores, _, num_ranks, _ = cores.shape
  scores = []
  for core in range(num_cores):
    right = [
      sum(
        cores[core, None, :, None, a, b] * column[..., b]
        for b in range(num_ranks)
      )
      for a in range(num_ranks)
    ]
    scores.append(sum(row[..., a] * right[a] for a in range(num_ranks)))
  return jnp.stack(scores, axis=-1)


def _take(
  scores: Float[Array, 'T P Q r'], index: Int[Array, 'T P k']
) -> Float[Array, 'T P k r']:
  def take(rows: Float[Array, 'Q r'], i: Int[Array, 'k']):
    return rows.at[i].get(mode='promise_in_bounds')

  return jax.vmap(jax.vmap(take))(scores, index)


def _select(
  row: Float[Array, 'T P Q r'],
  column: Float[Array, 'T P Q r'],
  core_sum: Float[Array, 'P r r'],
  directions: Directions,
  best: Callable,
  num_selected: int,
  num_quadrants: int,
):
  """Rows and columns [T, P, k] of the kept cells, tile by tile of tokens."""
  u_Pr, t_Pr = directions
  # Unrolled over r: a contraction that short is no matter for a matmul.
  ranks = range(row.shape[-1])
  a_TPQ = sum(row[..., a] * u_Pr[None, :, None, a] for a in ranks)
  b_TPQ = sum(column[..., a] * t_Pr[None, :, None, a] for a in ranks)
  i_TPm, j_TPm = jax.lax.platform_dependent(
    a_TPQ,
    b_TPQ,
    cuda=lambda *axes: _candidates_together(
      axes, best, num_selected, num_quadrants
    ),
    default=lambda *axes: tuple(
      _candidates(axis, best, num_selected, num_quadrants) for axis in axes
    ),
  )
  row_TPmr = _take(row, i_TPm)
  left_TPmr = sum(
    row_TPmr[..., a, None] * core_sum[None, :, None, a] for a in ranks
  )
  right_TPmr = _take(column, j_TPm)

  def best_cells(carry: None, pair: tuple[jax.Array, jax.Array]):
    return carry, _best_cells(*pair, best, num_selected, num_quadrants)

  cells = row.shape[1] * num_selected**2 // num_quadrants
  _, (p_TPk, q_TPk) = chunking.scan_tokens(
    best_cells,
    None,
    (left_TPmr, right_TPmr),
    _TILE_CELLS // cells,
  )
  take = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode='promise_in_bounds')))
  return take(i_TPm, p_TPk), take(j_TPm, q_TPk)


def _candidates(
  merged: Float[Array, 'T P Q'],
  best: Callable,
  num_selected: int,
  num_quadrants: int,
):
  """Keys with the largest merged scores; then those with the smallest."""
  if num_quadrants == 1:
    return best(merged, num_selected)[1]
  half = num_selected // 2
  found = best(merged, half)[1], best(-merged, half)[1]
  return jnp.concatenate(found, axis=-1)


def _candidates_together(
  axes: tuple[jax.Array, jax.Array],
  best: Callable,
  num_selected: int,
  num_quadrants: int,
):
  """Of both axes, by as many kernels as for one.

  A CPU would sort all scores: XLA makes top_k of a sort whose first part is
  used, and there each axis uses but half of that.
  """
  found = _candidates(jnp.concatenate(axes), best, num_selected, num_quadrants)
  return tuple(jnp.split(found, 2))


def _best_cells(
  left: Float[Array, 'T P m r'],
  right: Float[Array, 'T P m r'],
  best: Callable,
  num_selected: int,
  num_quadrants: int,
):
  """Positions (p, q) of the best cells among the candidates' grids."""
  side = num_selected // num_quadrants
  shape = (*left.shape[:2], num_quadrants, side, left.shape[-1])
  left_TPgmr, right_TPgmr = left.reshape(shape), right.reshape(shape)
  grid_TPgmm = sum(
    left_TPgmr[..., :, None, a] * right_TPgmr[..., None, :, a]
    for a in range(shape[-1])
  )
  grid_TPn = jnp.reshape(grid_TPgmm, (*shape[:2], -1))
  _, cell = best(grid_TPn, num_selected)
  quadrant, cell = cell // side**2, cell % side**2
  return quadrant * side + cell // side, quadrant * side + cell % side


def tucker_top_m_two_stage_reference(
  row: Float[Array, 'T P Q r'],
  column: Float[Array, 'T P Q r'],
  cores: Float[Array, 'c P r r'],
  num_selected: int,
  directions: Directions,
) -> tuple[Float[Array, 'T P k c'], Int[Array, 'T P k']]:
  """`tucker_top_m` as in the paper: every core scores every candidate."""
  u_Pr, t_Pr = directions
  _, i_TPm = top_m_reference(
    jnp.einsum('thqr,hr->thq', row, u_Pr), num_selected
  )
  _, j_TPm = top_m_reference(
    jnp.einsum('thqr,hr->thq', column, t_Pr), num_selected
  )
  row_TPmr = jnp.take_along_axis(row, i_TPm[..., None], axis=2)
  column_TPmr = jnp.take_along_axis(column, j_TPm[..., None], axis=2)
  grid = jnp.einsum('thip,chpq,thjq->thijc', row_TPmr, cores, column_TPmr)
  grid = grid.reshape(*grid.shape[:2], num_selected**2, -1)
  _, cell = top_m_reference(grid.sum(-1), num_selected)
  scores = jnp.take_along_axis(grid, cell[..., None], axis=2)
  i = jnp.take_along_axis(i_TPm, cell // num_selected, axis=2)
  j = jnp.take_along_axis(j_TPm, cell % num_selected, axis=2)
  return scores, i * row.shape[2] + j


def tucker_top_m_exhaustive_reference(
  row: Float[Array, 'T P Q r'],
  column: Float[Array, 'T P Q r'],
  cores: Float[Array, 'c P r r'],
  num_selected: int,
) -> tuple[Float[Array, 'T P k c'], Int[Array, 'T P k']]:
  """The best of all Q x Q cells; what no pre-filter can miss."""
  grid = jnp.einsum('thip,chpq,thjq->thijc', row, cores, column)
  grid = grid.reshape(*grid.shape[:2], row.shape[2] ** 2, -1)
  _, address = jax.lax.top_k(grid.sum(-1), num_selected)
  return jnp.take_along_axis(grid, address[..., None], axis=2), address


def leading_directions(core_sum: Float[Array, 'P r r']) -> Directions:
  """The leading left and right singular vectors of each core.

  A singular pair is defined up to a joint sign, which decides which quadrant
  of the grid the pre-filter looks at. The sign here makes the entries of both
  vectors sum to at least zero: deterministic, and continuous while the core's
  entries are positive, as they are at the start, because then all entries of
  the pair have one sign and the sum stays away from zero (Perron-Frobenius).
  For r = 2 the pair is computed in closed form; where both singular values are
  equal every direction leads, and one of them is returned, without a NaN.
  """
  if core_sum.shape[-1] == 2:
    u, t = _leading_directions_of_2x2(core_sum)
  else:
    left, _, right = jnp.linalg.svd(core_sum)
    u, t = left[..., :, 0], right[..., 0, :]
  total = u.sum(-1) + t.sum(-1)
  flip = (total < 0) | ((total == 0) & (u[..., 0] < 0))
  sign = jnp.where(flip, -1, 1).astype(u.dtype)[..., None]
  return sign * u, sign * t


def _halves(core: Float[Array, '*P 2 2']):
  """C as a scaled rotation (e, h) plus a scaled reflection (f, g)."""
  a, b, c, d = (core[..., i, j] for i in range(2) for j in range(2))
  return (a + d) / 2, (c - b) / 2, (a - d) / 2, (b + c) / 2


def _leading_directions_of_2x2(core: Float[Array, '*P 2 2']):
  e, h, f, g = _halves(core)
  rotation, reflection = jnp.arctan2(h, e), jnp.arctan2(g, f)
  phi, theta = (reflection + rotation) / 2, (reflection - rotation) / 2
  u = jnp.stack([jnp.cos(phi), jnp.sin(phi)], axis=-1)
  t = jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
  return u, t


def singular_values(core_sum: Float[Array, 'P r r']) -> Float[Array, 'P r']:
  """Singular values, largest first; differentiable, also where they meet."""
  if core_sum.shape[-1] != 2:
    return jnp.linalg.svd(core_sum, compute_uv=False)
  e, h, f, g = _halves(core_sum)
  rotation, reflection = _hypot(e, h), _hypot(f, g)
  return jnp.stack(
    [rotation + reflection, jnp.abs(rotation - reflection)], axis=-1
  )


def _hypot(x: Float[Array, '*P'], y: Float[Array, '*P']):
  """sqrt(x^2 + y^2) whose gradient at zero is zero instead of NaN."""
  square = x * x + y * y
  is_zero = square == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def lower_singular_loss(
  cores: Float[Array, 'c P r r'], margin: float
) -> Float[Array, '']:
  """Holds the summed cores near rank 1, where the pre-filter is faithful.

  The paper's auxiliary loss without its coefficient: the mean over heads of
  sum over i >= 2 of max(0, lambda_i - margin)^2 / (r - 1); 0 for r = 1.
  """
  rank = cores.shape[-1]
  if rank == 1:
    return jnp.zeros((), cores.dtype)
  lower = singular_values(cores.sum(0))[:, 1:]
  excess = jnp.maximum(lower - margin, 0)
  return (excess**2).sum(-1).mean() / (rank - 1)
