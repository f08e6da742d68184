# SPDX-License-Identifier: Apache-2.0
"""How evenly a memory layer's slots were used over a pass, in three numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxsparse.ops.memory import usage


@dataclasses.dataclass(frozen=True)
class SlotUsage:
  """What the reads of one layer's slots add up to."""

  # Fraction of the slots that are read at least once.
  usage_fraction: float
  # KL divergence from uniform reads, in nats: 0 for equal slots, log M for one.
  usage_kl: float
  # Gini coefficient of the reads: 0 for equal slots, 1 - 1 / M for one slot.
  gini: float


def measure(reads: np.ndarray) -> SlotUsage:
  """Usage of M slots from their reads [M]; zeros where there was none."""
  if not reads.any():
    return SlotUsage(0.0, 0.0, 0.0)
  reads_M = jnp.asarray(reads, jnp.int32)
  return SlotUsage(
    usage_fraction=float(usage.usage_fraction(reads_M)),
    usage_kl=float(usage.usage_kl(reads_M)),
    gini=_gini(reads),
  )


def _gini(reads: np.ndarray) -> float:
  num_slots = len(reads)
  position = np.arange(1, num_slots + 1)
  weighted = np.sum(position * np.sort(reads).astype(np.float64))
  share = weighted / (num_slots * reads.sum(dtype=np.float64))
  return float(2 * share - (num_slots + 1) / num_slots)
