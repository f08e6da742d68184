"""How evenly the slots of a memory are used.

Section 4 of the product-key paper (arXiv:1907.05242): the share of slots in
use, and the unevenness, the divergence of the hits from a uniform spread.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def count_hits(slot: Int[Array, '*B'], num_slots: int) -> Int[Array, 'M']:
  """How often each slot occurs.

  Integers, because a scatter of f32 scalars is a compare-and-swap loop on some
  GPU releases; and exact up to 2^31 hits.
  """
  hits = jnp.zeros(num_slots, jnp.int32)
  return hits.at[slot.reshape(-1)].add(1, mode='promise_in_bounds')


def share_used(hits: Int[Array, 'M']) -> Float[Array, '']:
  """Share of slots with at least one hit."""
  return (hits > 0).mean(dtype=jnp.float32)


def unevenness(hits: Int[Array, 'M']) -> Float[Array, '']:
  """log M + sum of z log z, z the share of hits, in nats.

  0 when all slots are hit equally often, log M when one slot takes all.
  """
  hits_f32 = hits.astype(jnp.float32)
  share = hits_f32 / jnp.maximum(hits_f32.sum(), 1)
  entropy = -jnp.where(
    share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0
  ).sum()
  return jnp.log(jnp.float32(hits.shape[0])) - entropy
