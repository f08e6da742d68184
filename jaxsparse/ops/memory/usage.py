# SPDX-License-Identifier: Apache-2.0
"""How evenly the slots of a memory are used, by tokens that are no padding.

Section 4 of the product-key paper (arXiv:1907.05242): the fraction of
the slots that is in use, and the KL divergence of the reads from a uniform
spread.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse import mesh

# Counts of more slots than this are kept for those alone that are read.
MOST_COUNTED = 2**22


def count_uses(
  slot: Int[Array, '*B'],
  num_slots: int,
  is_counted: Bool[Array, '*B'] | None = None,
) -> Int[Array, 'M']:
  """How often each slot occurs; where `is_counted` is False it does not count.

  Integers, because a scatter of f32 scalars is a compare-and-swap loop on some
  GPU releases; and exact up to 2^31 counts.
  """
  times = 1
  if is_counted is not None:
    times = is_counted.reshape(-1).astype(jnp.int32)
  counts = jnp.zeros(num_slots, jnp.int32)
  return counts.at[slot.reshape(-1)].add(times, mode='promise_in_bounds')


def counts_of_used(
  slot: Int[Array, '*B'], is_counted: Bool[Array, '*B'] | None = None
) -> Int[Array, 'R']:
  """`count_uses` without the slots: how often each that occurs does.

  Zeros come between; there are as many entries as reads. So the counts of a
  memory of 10^9 slots are no array of its size.
  """
  slot = slot.reshape(-1)
  if is_counted is None:
    times = jnp.ones(slot.shape, jnp.int32)
  else:
    times = is_counted.reshape(-1).astype(jnp.int32)
  slot, times = jax.lax.sort((slot, times), num_keys=1)
  is_new = jnp.concatenate([jnp.ones(1, bool), slot[1:] != slot[:-1]])
  position = jnp.cumsum(is_new, dtype=jnp.int32) - 1
  return jnp.zeros_like(times).at[position].add(times)


def mean_over_tokens(
  x: Float[Array, '*T F'], is_token: Bool[Array, '*T'] | None = None
) -> Float[Array, 'F']:
  """Means over the tokens that are no padding, 0 where there is none.

  Behind a guest's door (`mesh.inside`) over those of all devices.

  Args:
    x: figures of each token.
    is_token: False for padding, whose figures have no gradient; None if there
      is none.
  """
  axes = tuple(range(x.ndim - 1))
  if is_token is None:
    return mesh.mean(x.mean(axes))
  count = jnp.maximum(mesh.total(is_token.sum(dtype=jnp.int32)), 1)
  total = mesh.total(jnp.where(is_token[..., None], x, 0).sum(axes))
  return total / count.astype(x.dtype)


def usage_fraction(
  counts: Int[Array, 'C'], num_slots: int | None = None
) -> Float[Array, '']:
  """Fraction of the slots that are read at least once.

  Args:
    counts: of every slot, or of those that are read.
    num_slots: M; None for as many as there are counts.
  """
  if num_slots in (None, len(counts)):
    return (counts > 0).mean(dtype=jnp.float32)
  return (counts > 0).sum(dtype=jnp.float32) / num_slots


def usage_kl(
  counts: Int[Array, 'C'], num_slots: int | None = None
) -> Float[Array, '']:
  """KL divergence from uniform reads, log M + sum of z log z, in nats.

  z is a slot's share of the reads. 0 when all slots are read equally often, and
  with no read; log M when one slot gets all.

  Args:
    counts: of every slot, or of those that are read.
    num_slots: M; None for as many as there are counts.
  """
  counts_f32 = counts.astype(jnp.float32)
  total = counts_f32.sum()
  share = counts_f32 / jnp.maximum(total, 1)
  entropy = -jnp.where(
    share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0
  ).sum()
  num_slots = len(counts) if num_slots is None else num_slots
  return jnp.where(total > 0, jnp.log(jnp.float32(num_slots)) - entropy, 0)
