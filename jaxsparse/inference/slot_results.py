# SPDX-License-Identifier: Apache-2.0
"""What the programs of slots return: tokens on their way, and snapshots."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What one program has drawn, on the host."""

  # The next token of each slot [B]; what is there of slots that took no part
  # is no token.
  tokens: np.ndarray
  # Of the tokens [B], of the best ones [B, n], best first; None unless asked.
  logprob: np.ndarray | None = None
  top_ids: np.ndarray | None = None
  top_logprobs: np.ndarray | None = None
  # The same of the targets of `score`.
  prompt_logprob: np.ndarray | None = None
  prompt_top_ids: np.ndarray | None = None
  prompt_top_logprobs: np.ndarray | None = None


class Pending:
  """A result on its way from the device."""

  def __init__(
    self,
    tokens: jax.Array,
    best: tuple | None = None,
    of_prompt: tuple[tuple, int] | None = None,
    place: tuple[int | None, int] | None = None,
  ):
    """Starts to fetch it.

    Args:
      tokens: of all slots, or of one.
      best: their log-probabilities.
      of_prompt: those of a chunk's rows, and how many of them count.
      place: the slot, or None where `tokens` are of all and perhaps of more,
        and the number of slots.
    """
    scores, self._num_scores = of_prompt or (None, 0)
    self._arrays = (tokens, best, scores)
    self._place = place
    for x in jax.tree.leaves(self._arrays):
      x.copy_to_host_async()

  def is_ready(self) -> bool:
    return all(x.is_ready() for x in jax.tree.leaves(self._arrays))

  def result(self) -> Drawn:
    """Waits for the device."""
    tokens, best, scores = jax.tree.map(np.asarray, self._arrays)
    tokens, *best = map(self._placed, (tokens, *(best or (None,) * 3)))
    scores = [x[: self._num_scores] for x in scores or ()]
    return Drawn(tokens, *best, *scores)

  def _placed(self, x):
    if self._place is None or x is None:
      return x
    slot, num_slots = self._place
    if slot is None:
      return x[:num_slots]
    out = np.zeros((num_slots, *x.shape[1:]), x.dtype)
    out[slot] = x[0]
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """What snapshots are made of, on the device; several may share one."""

  arrays: Any

  @functools.cached_property
  def num_bytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self.arrays))


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A slot after some tokens; it can be inserted into any slot, any number of
  times.

  Attributes:
    length: tokens that were read.
    chunks: rows of each chunk, shared with snapshots of its beginning.
    rest: what is not in rows.
  """

  length: int
  chunks: tuple[Part, ...]
  rest: Part

  @property
  def parts(self) -> tuple[Part, ...]:
    return (*self.chunks, self.rest)

  @property
  def num_bytes(self) -> int:
    """Of all parts, also of those that others share."""
    return sum(part.num_bytes for part in self.parts)
