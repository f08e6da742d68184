"""Softmaxes over sets of keys, put together to one or added up.

Letters as in `block_selection`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse.ops import cpu
from jaxsparse.ops.softmax import softmax

# Scores of what is left out. Finite, such that sums with it make no NaN.
_NEVER = -1e30

# How far above the largest kept score another may lie: e^20 still has a finite
# gradient.
_MOST_ABOVE = 20.0


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Shares of the last axis where the mask is; 0 elsewhere, or everywhere."""
  shares = softmax(jnp.where(mask, scores, _NEVER))
  return jnp.where(mask, shares, 0.0)


class Part(NamedTuple):
  """A softmax that is not divided yet: its maximum, sum, and sum of values."""

  maximum: jax.Array
  total: jax.Array
  values: jax.Array


def partial_softmax(
  logits: Float[Array, 'B K n r G l'],
  is_seen: jax.Array,
  value: jax.Array,
  is_kept: jax.Array | bool = True,
  weight: jax.Array | None = None,
) -> Part:
  """Sums over the last axis.

  Args:
    logits: scores of l rows.
    is_seen: which rows count; as `is_kept` and `weight` of the logits' shape,
      or of one that is broadcast to it.
    value: [B, K, n, l, H], or [B, K, l, H] the same for all tiles.
    is_kept: what is seen and not kept adds nothing, but may have a gradient by
      its weight.
    weight: 1 for what is kept and 0 for other rows.
  """
  maximum = jnp.where(is_seen & is_kept, logits, _NEVER).max(-1)
  maximum = jax.lax.stop_gradient(maximum)
  above = jnp.minimum(logits - maximum[..., None], _MOST_ABOVE)
  share = jnp.where(is_seen, jnp.exp(above), 0.0)
  if weight is not None:
    share *= weight
  rows = 'bknl' if value.ndim == 5 else 'bkl'
  values = jnp.einsum(
    f'bknrgl,{rows}h->bknrgh',
    share.astype(value.dtype),
    value,
    preferred_element_type=share.dtype,
  )
  total = cpu.row_sums(share, f'bknrgl,{rows}->bknrg')
  return Part(maximum, total, values)


def combined(
  parts: Sequence[Part], gates: Float[Array, 'B K n r G 3'], combine: str
) -> tuple[Float[Array, 'B K n r G H'], Float[Array, 'B K n r G p']]:
  """One softmax over all parts ('merged'), or the sum of theirs ('gated').

  Returns:
    Sums of the values, 0 where nothing is seen, and each part's share of the
    softmax, or its gate.
  """
  gate = [gates[..., i] for i in range(len(parts))]
  if combine == 'gated':
    y = sum(
      g[..., None] * _divided(part.values, part.total)
      for g, part in zip(gate, parts, strict=True)
    )
    return y, jnp.stack(gate, axis=-1)
  maximum = jnp.stack([part.maximum for part in parts]).max(0)
  scale = [
    g * jnp.exp(part.maximum - maximum)
    for g, part in zip(gate, parts, strict=True)
  ]
  masses = [s * part.total for s, part in zip(scale, parts, strict=True)]
  total = sum(masses)
  values = sum(
    s[..., None] * part.values for s, part in zip(scale, parts, strict=True)
  )
  return _divided(values, total), _divided(jnp.stack(masses, -1), total)


def _divided(values: Float[Array, '*B n'], total: Float[Array, '*B']):
  """values / total, and 0 with no gradient where that is 0."""
  is_empty = total == 0
  safe = jnp.where(is_empty, 1.0, total)
  return jnp.where(is_empty[..., None], 0.0, values / safe[..., None])
