"""Tensor-decomposed query-key retrieval (TDQKR) of UltraMem.

arXiv:2411.12364, section 3. A slot is a cell (i, j) of a grid of Q x Q logical
keys. Each axis scores its keys in r ranks, and a small core C binds the two:

  score[i, j] = row[i] @ C @ column[j]

Scoring Q^2 cells is out of the question, so a rank-1 stand-in for the core
picks m rows and m columns, and only their m x m cells are scored in full.
With c cores a cell has c scores; their sum decides which cells are kept.

Letters: T tokens, H retrieval heads, Q keys per axis, r ranks, c cores, m
candidates per axis, k kept cells per head (k = m here).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import chunking
from jaxsparse.ops.top_k import top_m, top_m_reference

Directions = tuple[Float[Array, 'H r'], Float[Array, 'H r']]

# Cells that are scored at once. More tokens than that go tile by tile, so the
# grids of a long batch never stand in memory together.
_TILE_CELLS = 2**24


def tucker_top_m(
  row: Float[Array, 'T H Q r'],
  column: Float[Array, 'T H Q r'],
  cores: Float[Array, 'c H r r'],
  num_selected: int,
  *,
  directions: Directions | None = None,
  two_quadrants: bool = False,
) -> tuple[Float[Array, 'T H k c'], Int[Array, 'T H k']]:
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

  Returns:
    The c scores of each kept cell, best sum first, and its address i * Q + j
    (int32, or uint32 where Q^2 does not fit).
  """
  num_keys = row.shape[2]
  core_sum_Hrr = jax.lax.stop_gradient(cores.sum(0))
  if directions is None:
    directions = leading_directions(core_sum_Hrr)
  i_THk, j_THk = _select(
    jax.lax.stop_gradient(row),
    jax.lax.stop_gradient(column),
    core_sum_Hrr,
    jax.lax.stop_gradient(directions),
    num_selected,
    2 if two_quadrants else 1,
  )
  row_THkr, column_THkr = _take(row, i_THk), _take(column, j_THk)
  scores_THkc = _cell_scores(row_THkr, column_THkr, cores)
  dtype = jnp.int32 if num_keys**2 <= 2**31 else jnp.uint32
  address_THk = i_THk.astype(dtype) * jnp.asarray(num_keys, dtype)
  return scores_THkc, address_THk + j_THk.astype(dtype)


def _cell_scores(
  row: Float[Array, 'T H k r'],
  column: Float[Array, 'T H k r'],
  cores: Float[Array, 'c H r r'],
):
  """row[T, H, k] @ C[c, H] @ column[T, H, k], [T, H, k, c].

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
  scores: Float[Array, 'T H Q r'], index: Int[Array, 'T H k']
) -> Float[Array, 'T H k r']:
  def take(rows: Float[Array, 'Q r'], i: Int[Array, 'k']):
    return rows.at[i].get(mode='promise_in_bounds')

  return jax.vmap(jax.vmap(take))(scores, index)


def _select(
  row: Float[Array, 'T H Q r'],
  column: Float[Array, 'T H Q r'],
  core_sum: Float[Array, 'H r r'],
  directions: Directions,
  num_selected: int,
  num_quadrants: int,
):
  """Rows and columns [T, H, k] of the kept cells, tile by tile of tokens."""
  u_Hr, t_Hr = directions
  # Unrolled over r: a contraction that short is no matter for a matmul.
  ranks = range(row.shape[-1])
  a_THQ = sum(row[..., a] * u_Hr[None, :, None, a] for a in ranks)
  b_THQ = sum(column[..., a] * t_Hr[None, :, None, a] for a in ranks)
  i_THm, j_THm = jax.lax.platform_dependent(
    a_THQ,
    b_THQ,
    cuda=lambda *axes: _candidates_together(axes, num_selected, num_quadrants),
    default=lambda *axes: tuple(
      _candidates(axis, num_selected, num_quadrants) for axis in axes
    ),
  )
  row_THmr = _take(row, i_THm)
  left_THmr = sum(
    row_THmr[..., a, None] * core_sum[None, :, None, a] for a in ranks
  )
  right_THmr = _take(column, j_THm)

  def best_cells(carry: None, pair: tuple[jax.Array, jax.Array]):
    return carry, _best_cells(*pair, num_selected, num_quadrants)

  cells = row.shape[1] * num_selected**2 // num_quadrants
  _, (p_THk, q_THk) = chunking.scan_tokens(
    best_cells,
    None,
    (left_THmr, right_THmr),
    _TILE_CELLS // cells,
  )
  take = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode='promise_in_bounds')))
  return take(i_THm, p_THk), take(j_THm, q_THk)


def _candidates(
  merged: Float[Array, 'T H Q'], num_selected: int, num_quadrants: int
):
  """Keys with the largest merged scores; then those with the smallest."""
  if num_quadrants == 1:
    return top_m(merged, num_selected)[1]
  half = num_selected // 2
  best, worst = top_m(merged, half)[1], top_m(-merged, half)[1]
  return jnp.concatenate([best, worst], axis=-1)


def _candidates_together(
  axes: tuple[jax.Array, jax.Array], num_selected: int, num_quadrants: int
):
  """Of both axes, by as many kernels as for one.

  A CPU would sort all scores: XLA makes top_k of a sort whose first part is
  used, and there each axis uses but half of that.
  """
  found = _candidates(jnp.concatenate(axes), num_selected, num_quadrants)
  return tuple(jnp.split(found, 2))


def _best_cells(
  left: Float[Array, 'T H m r'],
  right: Float[Array, 'T H m r'],
  num_selected: int,
  num_quadrants: int,
):
  """Positions (p, q) of the best cells among the candidates' grids."""
  side = num_selected // num_quadrants
  shape = (*left.shape[:2], num_quadrants, side, left.shape[-1])
  left_THgmr, right_THgmr = left.reshape(shape), right.reshape(shape)
  grid_THgmm = sum(
    left_THgmr[..., :, None, a] * right_THgmr[..., None, :, a]
    for a in range(shape[-1])
  )
  grid_THn = jnp.reshape(grid_THgmm, (*shape[:2], -1))
  _, cell = top_m(grid_THn, num_selected)
  quadrant, cell = cell // side**2, cell % side**2
  return quadrant * side + cell // side, quadrant * side + cell % side


def tucker_top_m_two_stage_reference(
  row: Float[Array, 'T H Q r'],
  column: Float[Array, 'T H Q r'],
  cores: Float[Array, 'c H r r'],
  num_selected: int,
  directions: Directions,
) -> tuple[Float[Array, 'T H k c'], Int[Array, 'T H k']]:
  """`tucker_top_m` as the paper tells it: every core scores every candidate."""
  u_Hr, t_Hr = directions
  _, i_THm = top_m_reference(
    jnp.einsum('thqr,hr->thq', row, u_Hr), num_selected
  )
  _, j_THm = top_m_reference(
    jnp.einsum('thqr,hr->thq', column, t_Hr), num_selected
  )
  row_THmr = jnp.take_along_axis(row, i_THm[..., None], axis=2)
  column_THmr = jnp.take_along_axis(column, j_THm[..., None], axis=2)
  grid = jnp.einsum('thip,chpq,thjq->thijc', row_THmr, cores, column_THmr)
  grid = grid.reshape(*grid.shape[:2], num_selected**2, -1)
  _, cell = top_m_reference(grid.sum(-1), num_selected)
  scores = jnp.take_along_axis(grid, cell[..., None], axis=2)
  i = jnp.take_along_axis(i_THm, cell // num_selected, axis=2)
  j = jnp.take_along_axis(j_THm, cell % num_selected, axis=2)
  return scores, i * row.shape[2] + j


def tucker_top_m_exhaustive_reference(
  row: Float[Array, 'T H Q r'],
  column: Float[Array, 'T H Q r'],
  cores: Float[Array, 'c H r r'],
  num_selected: int,
) -> tuple[Float[Array, 'T H k c'], Int[Array, 'T H k']]:
  """The best of all Q x Q cells; what no pre-filter can miss."""
  grid = jnp.einsum('thip,chpq,thjq->thijc', row, cores, column)
  grid = grid.reshape(*grid.shape[:2], row.shape[2] ** 2, -1)
  _, address = jax.lax.top_k(grid.sum(-1), num_selected)
  return jnp.take_along_axis(grid, address[..., None], axis=2), address


def leading_directions(core_sum: Float[Array, 'H r r']) -> Directions:
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


def _halves(core: Float[Array, '*H 2 2']):
  """C as a scaled rotation (e, h) plus a scaled reflection (f, g)."""
  a, b, c, d = (core[..., i, j] for i in range(2) for j in range(2))
  return (a + d) / 2, (c - b) / 2, (a - d) / 2, (b + c) / 2


def _leading_directions_of_2x2(core: Float[Array, '*H 2 2']):
  e, h, f, g = _halves(core)
  rotation, reflection = jnp.arctan2(h, e), jnp.arctan2(g, f)
  phi, theta = (reflection + rotation) / 2, (reflection - rotation) / 2
  u = jnp.stack([jnp.cos(phi), jnp.sin(phi)], axis=-1)
  t = jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
  return u, t


def singular_values(core_sum: Float[Array, 'H r r']) -> Float[Array, 'H r']:
  """Singular values, largest first; differentiable, also where they meet."""
  if core_sum.shape[-1] != 2:
    return jnp.linalg.svd(core_sum, compute_uv=False)
  e, h, f, g = _halves(core_sum)
  rotation, reflection = _hypot(e, h), _hypot(f, g)
  return jnp.stack(
    [rotation + reflection, jnp.abs(rotation - reflection)], axis=-1
  )


def _hypot(x: Float[Array, '*H'], y: Float[Array, '*H']):
  """sqrt(x^2 + y^2) whose gradient at zero is zero instead of NaN."""
  square = x * x + y * y
  is_zero = square == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def lower_singular_loss(
  cores: Float[Array, 'c H r r'], margin: float
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
