# SPDX-License-Identifier: Apache-2.0
"""The validation pass of pairs: retrieval over all of the held-out ones."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import numpy as np

from jaxsparse.analysis.retrieval import (
  Direction,
  Retrieval,
  of_embeddings,
)
from jaxsparse.config import Config
from jaxsparse.run.progress import Reporter
from jaxsparse.training import pairs
from jaxsparse.training.evaluation import to_global

Batch = dict[str, np.ndarray]

# Compiled once for all passes of a run.
_embed = jax.jit(pairs.embed_step, static_argnums=0)
_score = jax.jit(pairs.score_step, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Pairs to validate on, of this process's rows of every batch."""

  # A pass over them in order.
  batches: Callable[[], Iterable[Batch]]
  # Of each, in that order: equal numbers are right for each other, int [n].
  items: np.ndarray
  # Those with distractors, each batch with each of its captions in turn.
  choices: Callable[[], Iterable[list[Batch]]]
  num_choices: int
  # What these are found by without a model, line by line.
  baselines: Callable[[], Iterable[str]] = tuple


@dataclasses.dataclass(frozen=True)
class PairValidation:
  """Result of a pass over the held-out pairs."""

  # Which picture is found by its text, and which text by its picture.
  retrieval: Retrieval | None
  # Nats per target of the captions, if they are learned.
  caption_loss: float | None
  # Share of the pairs whose caption scores above its distractors.
  chosen: float | None
  # Share of the frames that are read, if there are frames.
  share_read: float | None

  # Of language models.
  slot_counts: ClassVar[dict[str, np.ndarray]] = {}

  @property
  def loss(self) -> float:
    """What the best checkpoint has least of."""
    if self.caption_loss is not None:
      return self.caption_loss
    if self.retrieval is not None:
      found = self.retrieval
      return 1 - (found.captions.recall(1) + found.pictures.recall(1)) / 2
    return 1 - (self.chosen or 0.0)

  def scalars(self) -> dict[str, float]:
    found = {'validation_loss': self.loss}
    for name in ('caption_loss', 'chosen', 'share_read'):
      value = getattr(self, name)
      if value is not None:
        found[f'validation_{name}'] = value
    if self.retrieval is not None:
      for name, value in self.retrieval.scalars().items():
        found[f'validation_{name}'] = value
    return found

  def told(self) -> str:
    parts = []
    if self.retrieval is not None:
      parts.append(recalls(self.retrieval))
    if self.caption_loss is not None:
      parts.append(f'captions {self.caption_loss:.4f} nats/token')
    if self.chosen is not None:
      parts.append(f'right of its distractors {self.chosen:.1%}')
    if self.share_read is not None:
      parts.append(f'{self.share_read:.1%} of the frames read')
    return ', '.join(parts)


def recalls(
  found: Retrieval,
  of: Callable[[Direction], Callable[[int], float]] = lambda side: side.recall,
) -> str:
  """Recall at 1 and at 10 in both directions, or another figure of these."""
  sides = (
    ('picture -> caption', of(found.captions)),
    ('caption -> picture', of(found.pictures)),
  )
  return ', '.join(
    f'{name} {" ".join(f"R@{k} {share(k):.1%}" for k in (1, 10))}'
    for name, share in sides
  )


def validate(
  config: Config,
  params: dict,
  held_out: HeldOut,
  reporter: Reporter,
  is_to_stop: Callable[[], bool],
  compiles: bool = True,
) -> PairValidation | None:
  """Runs the pass; None if a signal stopped it.

  Args:
    config: of the run.
    params: on the mesh in use.
    held_out: the pairs.
    reporter: shows the progress.
    is_to_stop: is asked before every batch.
    compiles: whether this is the first pass, for which programs are made.
  """
  settings = config.multimodal
  assert settings is not None
  number, size = len(held_out.items), config.data.batch_size
  steps = math.ceil(number / size) + math.ceil(held_out.num_choices / size)
  sums: dict[str, float] = {}
  vectors: dict[str, list[np.ndarray]] = {'image': [], 'text': []}
  right, step = 0.0, 0
  with reporter.steps(0, steps, 'validation', compiles):
    for batch in held_out.batches():
      if is_to_stop():
        return None
      found = jax.device_get(_embed(config, params, to_global(batch)))
      for name, rows in vectors.items():
        rows.append(found.pop(name))
      for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + float(value)
      step += 1
      reporter.show(step, steps, {})
    for candidates in held_out.choices():
      if is_to_stop():
        return None
      right += _num_right(config, params, candidates)
      step += 1
      reporter.show(step, steps, {})
  image, text = (np.concatenate(rows)[:number] for rows in vectors.values())
  found = None
  if settings.contrastive_weight:
    found = of_embeddings(image, text, held_out.items, held_out.items)
  return PairValidation(
    retrieval=found,
    caption_loss=sums['nats'] / sums['targets'] if 'nats' in sums else None,
    chosen=right / held_out.num_choices if held_out.num_choices else None,
    share_read=sums['frames_read'] / sums['frames']
    if 'frames' in sums
    else None,
  )


def _num_right(
  config: Config, params: dict, candidates: list[dict[str, np.ndarray]]
) -> float:
  """Pairs whose own caption, the first, scores best; equal scores share."""
  scores = []
  for batch in candidates:
    score, is_there = jax.device_get(_score(config, params, to_global(batch)))
    scores.append(np.where(is_there, score, -np.inf))
  stacked = np.stack(scores)
  is_best = (stacked == stacked.max(0)) & np.isfinite(stacked)
  return float(np.sum(is_best[0] / np.maximum(is_best.sum(0), 1)))
