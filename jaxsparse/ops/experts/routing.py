# SPDX-License-Identifier: Apache-2.0
"""Token-choice routing: which experts a token passes, and in what order.

A router gives each token a score for each expert; the token passes the best k
and adds up their outputs, weighted by the scores (Switch Transformer,
arXiv:2101.03961; DeepSeek-V3, arXiv:2412.19437, for scores by a sigmoid). No
token is dropped: the T * k assignments are sorted by expert, and the experts
take as many rows as come.

Letters: T tokens, X experts, k experts of a token, A = T * k assignments, D
model width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.config.errors import UserError
from jaxsparse.ops.memory import usage
from jaxsparse.ops.shard_map_vma import argsort, match_vma
from jaxsparse.ops.top_k import top_m, top_m_reference

_KINDS = ('softmax', 'sigmoid')


def route(
  logits: Float[Array, 'T X'],
  num_experts_per_token: int,
  *,
  kind: str = 'softmax',
  normalize: bool = True,
  bias: Float[Array, 'X'] | None = None,
) -> tuple[Float[Array, 'T k'], Int[Array, 'T k']]:
  """The experts of each token and their weights, best first.

  Args:
    logits: of the router, f32 or f64.
    num_experts_per_token: experts per token, k.
    kind: 'softmax' over all experts, or 'sigmoid' of each logit.
    normalize: divide the kept weights by their sum.
    bias: added to the scores for the choice of experts alone, not to the
      weights (arXiv:2408.15664, eq. 3). It gets no gradient here.

  Raises:
    UserError: `kind` is none of the above.
  """
  scores = router_scores(logits, kind)
  choice = scores if bias is None else scores + bias[None]
  _, experts = top_m(jax.lax.stop_gradient(choice), num_experts_per_token)
  # By comparison: the gradient of an index would add scalars one by one, which
  # is slow on GPU.
  is_chosen = jax.nn.one_hot(experts, logits.shape[1], dtype=bool)
  weights = jnp.where(is_chosen, scores[:, None], 0).sum(-1)
  if normalize:
    weights /= weights.sum(-1, keepdims=True) + _tiny(weights)
  return weights, experts


def route_reference(
  logits: Float[Array, 'T X'],
  num_experts_per_token: int,
  *,
  kind: str = 'softmax',
  normalize: bool = True,
  bias: Float[Array, 'X'] | None = None,
) -> tuple[Float[Array, 'T k'], Int[Array, 'T k']]:
  """`route` by a stable sort and an index."""
  if kind == 'softmax':
    scores = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
  else:
    scores = 1 / (1 + jnp.exp(-logits))
  choice = scores if bias is None else scores + bias[None]
  _, experts = top_m_reference(choice, num_experts_per_token)
  weights = jnp.take_along_axis(scores, experts, axis=-1)
  if normalize:
    weights /= weights.sum(-1, keepdims=True)
  return weights, experts


def router_scores(
  logits: Float[Array, '*T X'], kind: str = 'softmax'
) -> Float[Array, '*T X']:
  """What weighs the experts of a token, between 0 and 1.

  Raises:
    UserError: `kind` is neither 'softmax' nor 'sigmoid'.
  """
  if kind not in _KINDS:
    raise UserError(
      f'router = {kind!r} must be one of {", ".join(map(repr, _KINDS))}.'
    )
  return jax.nn.softmax(logits) if kind == 'softmax' else jax.nn.sigmoid(logits)


def shares_of_scores(
  logits: Float[Array, '*T X'], kind: str = 'softmax'
) -> Float[Array, '*T X']:
  """A token's scores as shares of their sum (DeepSeek-V3, eq. 19)."""
  scores = router_scores(logits, kind)
  if kind == 'softmax':
    return scores
  return scores / (scores.sum(-1, keepdims=True) + _tiny(scores))


def load_balance_loss(
  shares: Float[Array, '*T X'],
  load: Int[Array, 'X'],
  is_token: Bool[Array, '*T'] | None = None,
) -> Float[Array, '']:
  """X * sum of f * P over experts (Switch, eq. 4 to 6).

  f is an expert's share of all assignments, P its mean share of the scores. For
  k = 1 this is the paper's; for any k, even routing gives 1, and X / k is the
  most that k experts per token can make of it. Only P has a gradient.

  Args:
    shares: of each token's scores, over the whole batch.
    load: assignments of each expert, over the whole batch.
    is_token: False for padding, which is not in `load` either; None if there is
      none.
  """
  mean_share = usage.mean_over_tokens(shares, is_token)
  return len(load) * (load_shares(load) * mean_share).sum()


def router_z_loss(
  logits: Float[Array, '*T X'], is_token: Bool[Array, '*T'] | None = None
) -> Float[Array, '']:
  """Mean over tokens of the squared log-partition (ST-MoE, eq. 5)."""
  log_partition = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return usage.mean_over_tokens(jnp.square(log_partition), is_token)[0]


def bias_balance_term(
  bias: Float[Array, 'X'], load: Int[Array, 'X']
) -> Float[Array, '']:
  """Zero, with an expert's load above the mean as the gradient of its bias.

  Descending along the signs of that is the balancing without a loss of
  arXiv:2408.15664 (algorithm 1): too popular experts lose in the choice.
  """
  shares = load_shares(load)
  term = (bias * (shares - shares.mean())).sum()
  return term - jax.lax.stop_gradient(term)


def load_shares(load: Int[Array, 'X']) -> Float[Array, 'X']:
  """Each expert's share of all assignments."""
  load_f32 = load.astype(jnp.float32)
  return load_f32 / jnp.maximum(load_f32.sum(), 1)


class Dispatch(NamedTuple):
  """The assignments sorted by expert; assignment t * k + j is token t's j-th.

  Assignments to no expert at hand come last and belong to no group.
  """

  # Assignment at each place of the sorted order.
  order: Int[Array, 'A']
  # Place of each assignment.
  inverse: Int[Array, 'A']
  # Assignments of each expert.
  sizes: Int[Array, 'X']


def dispatch_order(
  experts: Int[Array, 'T k'],
  num_experts: int,
  first_expert: jax.Array | int = 0,
) -> Dispatch:
  """Sorts by expert; in a group, tokens keep their order.

  Args:
    experts: of each token.
    num_experts: how many experts are at hand, X.
    first_expert: the first of them.
  """
  local = experts.reshape(-1) - first_expert
  is_own = (local >= 0) & (local < num_experts)
  local = jnp.where(is_own, local, num_experts)
  order = argsort(local).astype(jnp.int32)
  # By comparison, as X is small: a scatter of scalars is slow on some GPUs.
  ends = (local[:, None] <= jnp.arange(num_experts)[None]).sum(0, jnp.int32)
  sizes = jnp.diff(ends, prepend=jnp.zeros_like(ends[:1]))
  return Dispatch(order, argsort(order).astype(jnp.int32), sizes)


def to_experts(
  x: Float[Array, 'T D'], dispatch: Dispatch, num_experts_per_token: int
) -> Float[Array, 'A D']:
  """The row of each assignment's token, sorted by expert."""
  return _to_experts(*match_vma(x, dispatch), num_experts_per_token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _to_experts(
  x: Float[Array, 'T D'], dispatch: Dispatch, num_experts_per_token: int
):
  return x[dispatch.order // num_experts_per_token]


def _gradient_of_tokens(
  num_experts_per_token: int, dispatch: Dispatch, cotangent: Float[Array, 'A D']
):
  # A gather and a sum: the transposed gather would add rows one by one.
  by_token = cotangent[dispatch.inverse].reshape(
    -1, num_experts_per_token, cotangent.shape[1]
  )
  dtype = jnp.promote_types(cotangent.dtype, jnp.float32)
  return by_token.sum(1, dtype=dtype).astype(cotangent.dtype), None


_to_experts.defvjp(
  lambda x, dispatch, num_experts_per_token: (
    _to_experts(x, dispatch, num_experts_per_token),
    dispatch,
  ),
  _gradient_of_tokens,
)


@jax.custom_vjp
def _in_token_order(rows: Float[Array, 'A D'], dispatch: Dispatch):
  return rows[dispatch.inverse]


_in_token_order.defvjp(
  lambda rows, dispatch: (_in_token_order(rows, dispatch), dispatch),
  lambda dispatch, cotangent: (cotangent[dispatch.order], None),
)


def from_experts(
  rows: Float[Array, 'A D'], weights: Float[Array, 'T k'], dispatch: Dispatch
) -> Float[Array, 'T D']:
  """Weighted sums of each token's k rows, in f32 at least."""
  rows = _in_token_order(*match_vma(rows, dispatch))
  return weighted_sum(rows, weights)


def weighted_sum(
  rows: Float[Array, 'A D'], weights: Float[Array, 'T k']
) -> Float[Array, 'T D']:
  """Weighted sums of k successive rows, in f32 at least."""
  dtype = jnp.promote_types(weights.dtype, jnp.float32)
  by_token = rows.reshape(*weights.shape, -1).astype(dtype)
  return (by_token * weights[..., None]).sum(1)


def _tiny(x: jax.Array):
  return jnp.finfo(x.dtype).tiny
