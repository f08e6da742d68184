"""The best m of many scores, on the fast path of every backend.

Two habits decide the speed (letters: Q candidates, m kept):
  * `lax.top_k` on bf16 falls back to a full sort on CPU and GPU, so scores are
    cast to f32 first;
  * a stable order of ties costs a full sort on GPU for m > 16, and a bag does
    not care for the order, so it is given up where JAX lets us (0.11 on).
"""

import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_CAN_BE_UNSTABLE = 'is_stable' in inspect.signature(jax.lax.top_k).parameters


def top_m(
  scores: Float[Array, '*B Q'], num_selected: int, *, is_stable: bool = False
) -> tuple[Float[Array, '*B m'], Int[Array, '*B m']]:
  """The largest scores of the last axis, in descending order.

  Args:
    scores: candidates; f64 stays f64, narrower types are compared in f32.
    num_selected: how many to keep, m.
    is_stable: equal scores come by ascending index, as in the reference.

  Returns:
    The values (f32 or f64) and their indices.
  """
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  *batch, num_candidates = scores.shape
  options = {'is_stable': is_stable} if _CAN_BE_UNSTABLE else {}
  # Only the flat form is sure to reach the specialised kernels.
  values, indices = jax.lax.top_k(
    scores.reshape(-1, num_candidates), num_selected, **options
  )
  shape = (*batch, num_selected)
  return values.reshape(shape), indices.reshape(shape)


def top_m_reference(
  scores: Float[Array, '*B Q'], num_selected: int
) -> tuple[Float[Array, '*B m'], Int[Array, '*B m']]:
  """`top_m` by a stable sort."""
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  indices = jnp.argsort(-scores, axis=-1, stable=True)[..., :num_selected]
  return jnp.take_along_axis(scores, indices, axis=-1), indices
