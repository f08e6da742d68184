# SPDX-License-Identifier: Apache-2.0
"""Importance of key blocks by small projections of their own.

The attention's own scores choose blocks well where summaries of its keys show
what is in them. A router learns that instead (the lightning indexer of
DeepSeek-V3.2, on blocks): J small heads score a block's mean key by ReLU, a
query weighs the heads, and a loss of its own makes the shares those of the
softmax that the kept blocks get. Nothing else trains it, and it trains nothing
else: what it projects, and what it is compared with, have no gradient.

Letters as in `block_selection`; J heads of width I. A width of 0 is no router.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Shares below it count as that in the loss.
_LEAST_SHARE = 1e-9


class Router(NamedTuple):
  """Queries with the weights of their heads, of T rows, and keys of S."""

  query: Float[Array, 'B T J I']
  weight: Float[Array, 'B T J']
  key: Float[Array, 'B S I']

  @property
  def is_used(self) -> bool:
    return self.key.shape[-1] > 0


def no_router(batch: int, num_queries: int, num_keys: int) -> Router:
  """A router of width 0: all models then have the same arrays."""
  return Router(
    jnp.zeros((batch, num_queries, 0, 0)),
    jnp.zeros((batch, num_queries, 0)),
    jnp.zeros((batch, num_keys, 0)),
  )


def router_scores(router: Router) -> Float[Array, 'B T S']:
  """sum_j weight_j relu(query_j . key), scaled by the numbers of both sums."""
  num_heads, width = router.query.shape[2:]
  products = jnp.einsum('btji,bsi->btjs', router.query, router.key)
  scores = jnp.einsum('btjs,btj->bts', jax.nn.relu(products), router.weight)
  return scores * (num_heads * width) ** -0.5


def router_loss(
  shares: Float[Array, 'B K n Z'],
  block: Int[Array, 'B K n k'],
  masses: Float[Array, 'B K n k'],
) -> Float[Array, 'B K n']:
  """Divergence KL(P || S) of each tile, over the blocks that it keeps.

  Args:
    shares: the router's, of all blocks.
    block: of each candidate.
    masses: P, what the attention gives each candidate's block, of sum 1; or 0
      where nothing is kept, which costs nothing.
  """
  masses = jax.lax.stop_gradient(masses)
  is_kept = masses > 0
  share = jnp.take_along_axis(shares, block, axis=-1)
  share = jnp.where(is_kept, jnp.maximum(share, _LEAST_SHARE), 0.0)
  total = share.sum(-1, keepdims=True)
  # Logarithms of 1 where nothing is kept.
  ratio = masses * jnp.where(total > 0, total, 1.0)
  ratio = jnp.where(is_kept, ratio / jnp.where(is_kept, share, 1.0), 1.0)
  return (masses * jnp.log(ratio)).sum(-1)
