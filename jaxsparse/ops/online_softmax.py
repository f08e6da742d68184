# SPDX-License-Identifier: Apache-2.0
"""Softmaxes over sets of keys, merged into one or added up.

Letters as in `block_selection`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse.ops import cpu
from jaxsparse.ops.softmax import softmax

# Score of what is left out. It is finite: sums with it make no NaN.
_NEVER = -1e30

# How far above the largest kept score another may lie: e^20 still has a finite
# gradient.
_MOST_ABOVE = 20.0


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Shares of the last axis where the mask is; 0 elsewhere, or everywhere."""
  shares = softmax(jnp.where(mask, scores, _NEVER))
  return jnp.where(mask, shares, 0.0)


class SoftmaxState(NamedTuple):
  """Running state of an online softmax: maximum, sum, and sum of values."""

  maximum: jax.Array
  total: jax.Array
  values: jax.Array


def partial_softmax(
  logits: Float[Array, 'B K n r G l'],
  is_seen: jax.Array,
  value: jax.Array,
  is_kept: jax.Array | bool = True,
  weight: jax.Array | None = None,
  value_scale: jax.Array | None = None,
) -> SoftmaxState:
  """Sums over the last axis.

  Args:
    logits: scores of l rows.
    is_seen: which rows count; as `is_kept` and `weight` of the logits' shape,
      or of one that is broadcast to it.
    value: [B, K, n, l, H], or [B, K, l, H] the same for all tiles.
    is_kept: what is seen and not kept adds nothing, but may have a gradient by
      its weight.
    weight: 1 for what is kept and 0 for other rows.
    value_scale: [B, K, n, l], by which rows of values are yet to be multiplied.
  """
  maximum = jnp.where(is_seen & is_kept, logits, _NEVER).max(-1)
  maximum = jax.lax.stop_gradient(maximum)
  above = jnp.minimum(logits - maximum[..., None], _MOST_ABOVE)
  share = jnp.where(is_seen, jnp.exp(above), 0.0)
  if weight is not None:
    share *= weight
  rows = 'bknl' if value.ndim == 5 else 'bkl'
  of_values = share
  if value_scale is not None:
    of_values = share * value_scale[:, :, :, None, None]
  values = jnp.einsum(
    f'bknrgl,{rows}h->bknrgh',
    of_values.astype(value.dtype),
    value,
    preferred_element_type=share.dtype,
  )
  total = cpu.row_sums(share, f'bknrgl,{rows}->bknrg')
  return SoftmaxState(maximum, total, values)


def merge_states(
  states: Sequence[SoftmaxState],
  gates: Float[Array, 'B K n r G 3'],
  combine: str,
) -> tuple[Float[Array, 'B K n r G H'], Float[Array, 'B K n r G p']]:
  """One softmax over all the keys ('merged'), or the sum of several ('gated').

  Returns:
    Sums of the values, 0 where nothing is seen, and each state's share of the
    softmax, or its gate.
  """
  gate = [gates[..., i] for i in range(len(states))]
  if combine == 'gated':
    y = sum(
      g[..., None] * _divided(state.values, state.total)
      for g, state in zip(gate, states, strict=True)
    )
    return y, jnp.stack(gate, axis=-1)
  maximum = jnp.stack([state.maximum for state in states]).max(0)
  scale = [
    g * jnp.exp(state.maximum - maximum)
    for g, state in zip(gate, states, strict=True)
  ]
  masses = [s * state.total for s, state in zip(scale, states, strict=True)]
  total = sum(masses)
  values = sum(
    s[..., None] * state.values for s, state in zip(scale, states, strict=True)
  )
  return _divided(values, total), _divided(jnp.stack(masses, -1), total)


def _divided(values: Float[Array, '*B n'], total: Float[Array, '*B']):
  """values / total, and 0 with no gradient where that is 0."""
  is_empty = total == 0
  safe = jnp.where(is_empty, 1.0, total)
  return jnp.where(is_empty[..., None], 0.0, values / safe[..., None])
