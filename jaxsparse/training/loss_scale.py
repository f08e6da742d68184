# SPDX-License-Identifier: Apache-2.0
"""A loss scale that follows the gradients of float16 (arXiv:1710.03740).

float16 ends at 65504, and what is below 2^-24 is zero: gradients of a loss as
it is are mostly too small. So the backward pass begins at a multiple of the
loss, and gradients are divided by it in float32 before anybody looks at them.
Where they are not finite, the multiple was too large: the step is left out,
and the next one has half of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.training.optimizers.row_updates import scaled

FIRST, LEAST, MOST = 2.0**15, 1.0, 2.0**24
# Steps without overflow after which the scale is doubled.
PATIENCE = 2000


class LossScale(NamedTuple):
  """Part of a train state in float16.

  Attributes:
    scale: what the next loss is multiplied by.
    num_good: steps without overflow since it last changed.
    num_overflows: steps left out so far.
  """

  scale: Float[Array, '']
  num_good: Int[Array, '']
  num_overflows: Int[Array, '']


def first(dtype: str) -> LossScale | None:
  """The scale of a run's first step; None where activations need none."""
  if dtype != 'float16':
    return None
  # Two arrays, as none may be donated twice.
  counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
  return LossScale(jnp.float32(FIRST), *counts)


def after(state: LossScale, is_finite: jax.Array) -> LossScale:
  """The scale after a step whose gradients were finite, or were not."""
  num_good = jnp.where(is_finite, state.num_good + 1, 0)
  is_due = num_good >= PATIENCE
  grown = jnp.where(is_due, 2 * state.scale, state.scale)
  scale = jnp.where(is_finite, grown, state.scale / 2)
  return LossScale(
    jnp.clip(scale, LEAST, MOST),
    jnp.where(is_due, 0, num_good),
    state.num_overflows + ~is_finite,
  )


def multiplied(loss: jax.Array, state: LossScale | None) -> jax.Array:
  """What the backward pass is to begin at."""
  return loss if state is None else loss * state.scale


def divided(gradients: Any, state: LossScale | None) -> Any:
  """Gradients of the loss itself, arrays and `RowGradient`s."""
  return gradients if state is None else scaled(gradients, 1 / state.scale)


def only_if(is_finite: jax.Array, new: Any, old: Any) -> Any:
  """`new`, or after an overflow the `old` that it was made of."""
  return jax.tree.map(lambda a, b: jax.lax.select(is_finite, a, b), new, old)
