"""How evenly a memory layer's slots are used, from the slots that were read.

Lample et al. 2019 (arXiv:1907.05242), section 4.5: the share of slots that are
used at all, and the unevenness, the divergence of the distribution of hits from
the uniform one. Counts are kept on the host, in int64: a pass over a
validation set can be longer than 2 ** 31 reads.
"""

from collections.abc import Mapping

import jax
import numpy as np


class SlotCounts:
  """Hits of every physical slot of every memory layer, over a pass."""

  def __init__(self, num_slots: int):
    self._num_slots = num_slots
    self._counts: dict[str, np.ndarray] = {}

  def add(self, slots: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Counts one batch: for each layer slots of any shape, -1 for padding.

    Raises:
      ValueError: a slot is not of a table of `num_slots` rows.
    """
    for layer, slot in slots.items():
      slot = np.asarray(slot).reshape(-1)
      slot = slot[slot >= 0]
      counts = np.bincount(slot, minlength=self._num_slots)
      if len(counts) > self._num_slots:
        raise ValueError(
          f'{layer} read slot {len(counts) - 1} of {self._num_slots}.'
        )
      self._counts[layer] = self._counts.get(layer, 0) + counts

  @property
  def by_layer(self) -> dict[str, np.ndarray]:
    """Counts [M] of each layer."""
    return dict(self._counts)

  def summary(self) -> dict[str, float]:
    """Scalars of every layer, as 'block_01/memory/slots_used_in_pass'."""
    scalars = {}
    for layer, counts in self._counts.items():
      prefix = f'{layer}/memory'
      scalars[f'{prefix}/slots_used_in_pass'] = share_used(counts)
      scalars[f'{prefix}/unevenness_in_pass'] = unevenness(counts)
      scalars[f'{prefix}/gini_in_pass'] = gini(counts)
    return scalars


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
