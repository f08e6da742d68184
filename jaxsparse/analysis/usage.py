"""How evenly a memory layer's slots are used, from the slots that were read.

Lample et al. 2019 (arXiv:1907.05242), section 4.5: the share of slots that are
used at all, and the unevenness, the divergence of the distribution of hits from
the uniform one. Counts are kept on the host, in int64: a pass over a
validation set can be longer than 2 ** 31 reads.
"""

import jax
import numpy as np


def count_hits(slots: np.ndarray | jax.Array, num_slots: int) -> np.ndarray:
  """Reads [M] of every slot; counts of several batches add up.

  Args:
    slots: physical slots that were read, of any shape, -1 for padding.
    num_slots: rows M of the table.

  Raises:
    ValueError: a slot is not of a table of `num_slots` rows.
  """
  slots = np.asarray(slots).reshape(-1)
  counts = np.bincount(slots[slots >= 0], minlength=num_slots)
  if len(counts) > num_slots:
    raise ValueError(f'slot {len(counts) - 1} was read, of {num_slots}.')
  return counts


def share_used(counts: np.ndarray) -> float:
  """Share of slots with at least one hit."""
  return float(np.mean(counts > 0))


def unevenness(counts: np.ndarray) -> float:
  """log M + sum z log z in nats, z the shares of the M slots in all hits.

  0 when all slots are hit equally often, log M when one takes every hit; 0 for
  counts without a hit.
  """
  total = counts.sum()
  if total == 0:
    return 0.0
  z = counts[counts > 0] / total
  return float(np.log(len(counts)) + np.sum(z * np.log(z)))


def gini(counts: np.ndarray) -> float:
  """Gini coefficient of the hits: 0 for equal slots, 1 - 1 / M for one slot."""
  total = counts.sum()
  if total == 0:
    return 0.0
  num_slots = len(counts)
  rank = np.arange(1, num_slots + 1)
  weighted = np.sum(rank * np.sort(counts).astype(np.float64))
  return float(2 * weighted / (num_slots * total) - (num_slots + 1) / num_slots)
