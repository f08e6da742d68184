"""How evenly a memory layer's slots were used over a pass, in three numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxsparse.ops.memory import usage


@dataclasses.dataclass(frozen=True)
class SlotUsage:
  """What the hits of one layer's slots add up to."""

  # Share of slots with at least one hit.
  share_used: float
  # Divergence from equal hits in nats: 0 for equal slots, log M for one slot.
  unevenness: float
  # Gini coefficient of the hits: 0 for equal slots, 1 - 1 / M for one slot.
  gini: float


def measure(hits: np.ndarray) -> SlotUsage:
  """Usage of M slots from their `hits` [M]; zeros where there was no hit."""
  if not hits.any():
    return SlotUsage(0.0, 0.0, 0.0)
  hits_M = jnp.asarray(hits, jnp.int32)
  return SlotUsage(
    share_used=float(usage.share_used(hits_M)),
    unevenness=float(usage.unevenness(hits_M)),
    gini=_gini(hits),
  )


def _gini(hits: np.ndarray) -> float:
  num_slots = len(hits)
  rank = np.arange(1, num_slots + 1)
  weighted = np.sum(rank * np.sort(hits).astype(np.float64))
  share = weighted / (num_slots * hits.sum(dtype=np.float64))
  return float(2 * share - (num_slots + 1) / num_slots)
