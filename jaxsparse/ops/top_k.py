# SPDX-License-Identifier: Apache-2.0
"""The best k of many scores, on the fast path of every backend.

Three habits decide the speed (letters: Q candidates, k selected):
  * `lax.top_k` on bf16 falls back to a full sort on CPU and GPU, so scores are
    cast to f32 first;
  * a stable order of ties costs a full sort on GPU for k > 16, and a bag does
    not care for the order, so it is given up where JAX lets us (0.11 on);
  * XLA's CPU sorts through a comparator, and counting is faster for many rows
    of few candidates (`cpu.count_top_k`).
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import cpu
from jaxsparse.ops.shard_map_vma import argsort

# A bench turns it off, to see what it brings.
CAN_BE_UNSTABLE = 'is_stable' in inspect.signature(jax.lax.top_k).parameters


def top_m(
  scores: Float[Array, '*B Q'], num_selected: int, *, is_stable: bool = False
) -> tuple[Float[Array, '*B k'], Int[Array, '*B k']]:
  """The largest scores of the last axis, in descending order.

  Args:
    scores: candidates; f64 stays f64, narrower types are compared in f32.
    num_selected: how many to keep, k.
    is_stable: equal scores come by ascending index, as in the reference.

  Returns:
    The values (f32 or f64) and their indices.
  """
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  *batch, num_candidates = scores.shape
  options = {'is_stable': is_stable} if CAN_BE_UNSTABLE else {}
  # Only the flat form is sure to reach the specialised kernels.
  rows = scores.reshape(-1, num_candidates)

  def best(rows):
    return tuple(jax.lax.top_k(rows, num_selected, **options))

  if cpu.counts_faster(rows, num_selected):
    counted = functools.partial(cpu.count_top_k, num_selected=num_selected)
    values, indices = jax.lax.platform_dependent(
      rows, cpu=counted, default=best
    )
  else:
    values, indices = best(rows)
  shape = (*batch, num_selected)
  return values.reshape(shape), indices.reshape(shape)


def top_m_reference(
  scores: Float[Array, '*B Q'], num_selected: int
) -> tuple[Float[Array, '*B k'], Int[Array, '*B k']]:
  """`top_m` by a stable sort."""
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  indices = argsort(-scores)[..., :num_selected]
  return jnp.take_along_axis(scores, indices, axis=-1), indices
