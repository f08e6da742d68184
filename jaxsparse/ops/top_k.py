# SPDX-License-Identifier: Apache-2.0
"""The best k of many scores, on the fast path of every backend.

Four habits decide the speed (letters: Q candidates, k selected):
  * `lax.top_k` on bf16 falls back to a full sort on CPU and GPU, so scores are
    cast to f32 first;
  * a stable order of ties costs a full sort on GPU for k > 16, and a bag does
    not care for the order, so it is given up where JAX lets us (0.11 on);
  * XLA's CPU sorts through a comparator, and counting is faster for many rows
    of few candidates (`cpu.count_top_k`), or of many that groups leave out
    (`cpu.bisect_top_k`);
  * a GPU's kernel for an order of its own choice ends a CUDA graph, which a
    decode step should be one of (JAX 0.11), or takes 32 MiB of scratch (0.12):
    few rows of few candidates, as of a router, are ranked by comparison there,
    and a memory layer asks for a stable order while it decodes.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import cpu
from jaxsparse.ops.shard_map_vma import argsort

# Pairs of candidates, of all rows, that a GPU compares at most: in one kernel,
# and in less time than another launch takes.
_COMPARED_PAIRS = 2**20

CAN_BE_UNSTABLE = 'is_stable' in inspect.signature(jax.lax.top_k).parameters

# A bench turns it off, to see what it brings.
KEEPS_GRAPHS = True


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
  options = {}
  if CAN_BE_UNSTABLE:
    options['is_stable'] = is_stable and KEEPS_GRAPHS
  # Only the flat form is sure to reach the specialised kernels.
  rows = scores.reshape(-1, num_candidates)

  def best(rows):
    return tuple(jax.lax.top_k(rows, num_selected, **options))

  forms = {}
  if cpu.counts_faster(rows, num_selected):
    forms['cpu'] = functools.partial(cpu.count_top_k, num_selected=num_selected)
  elif cpu.bisects_faster(rows, num_selected):
    forms['cpu'] = functools.partial(
      cpu.bisect_top_k, num_selected=num_selected
    )
  if KEEPS_GRAPHS and len(rows) * num_candidates**2 <= _COMPARED_PAIRS:
    forms['cuda'] = functools.partial(compare_top_k, num_selected=num_selected)
  if forms:
    values, indices = jax.lax.platform_dependent(rows, **forms, default=best)
  else:
    values, indices = best(rows)
  shape = (*batch, num_selected)
  return values.reshape(shape), indices.reshape(shape)


def compare_top_k(
  rows: Float[Array, 'T Q'], num_selected: int
) -> tuple[Float[Array, 'T k'], Int[Array, 'T k']]:
  """`lax.top_k`, with its stable order, by comparing all pairs of a row.

  A candidate's place is the number of others before it, and one sum finds who
  is at each place: no sort, and on a GPU no array of pairs in memory.
  """
  scores = jax.lax.stop_gradient(rows)
  position = jnp.arange(scores.shape[1], dtype=jnp.int32)
  other, own = scores[:, :, None], scores[:, None]
  is_earlier = (position[:, None] < position[None])[None]
  is_before = (other > own) | ((other == own) & is_earlier)
  place = is_before.sum(1, dtype=jnp.int32)
  wanted = jnp.arange(num_selected, dtype=jnp.int32)[None, :, None]
  indices = jnp.where(place[:, None] == wanted, position[None, None], 0).sum(
    -1, dtype=jnp.int32
  )
  # NaNs are before no other: several of them have place 0.
  indices = jnp.minimum(indices, scores.shape[1] - 1)
  return jnp.take_along_axis(rows, indices, axis=-1), indices


def top_m_reference(
  scores: Float[Array, '*B Q'], num_selected: int
) -> tuple[Float[Array, '*B k'], Int[Array, '*B k']]:
  """`top_m` by a stable sort."""
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  indices = argsort(-scores)[..., :num_selected]
  return jnp.take_along_axis(scores, indices, axis=-1), indices
