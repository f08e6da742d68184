# SPDX-License-Identifier: Apache-2.0
"""From log-likelihoods to accuracies and bits per byte, with standard errors.

Each metric is a ratio of two sums over items: of a mean the lower one counts
them, of bits per byte it counts bytes. So one formula gives every standard
error, and that of the paired difference of two models.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Metric:
  """A ratio of sums over n items, independent of each other.

  Attributes:
    parts: of each item, float64 [n].
    sizes: what they are shared by, [n]: ones, or bytes.
    is_exponential: the metric is exp of the ratio: a perplexity.
    chance: what guessing gives; None where that has no meaning.
  """

  parts: np.ndarray
  sizes: np.ndarray
  is_exponential: bool = False
  chance: float | None = None

  @classmethod
  def mean(cls, values: Sequence[float], **more: float | bool | None):
    return cls(np.array(values, np.float64), np.ones(len(values)), **more)

  @property
  def value(self) -> float:
    ratio = self._ratio
    return math.exp(min(ratio, 700.0)) if self.is_exponential else ratio

  @property
  def error(self) -> float | None:
    """Standard error, with n - 1; of one item there is none.

    Of an accuracy p that is sqrt(p (1 - p) / (n - 1)).
    """
    count = len(self.parts)
    if count < 2:
      return None
    rest = self.parts - self._ratio * self.sizes
    variance = count / (count - 1) * np.sum(rest**2)
    error = float(np.sqrt(variance) / np.sum(self.sizes))
    return error * self.value if self.is_exponential else error

  @property
  def _ratio(self) -> float:
    return float(np.sum(self.parts) / np.sum(self.sizes))

  def minus(self, other: 'Metric') -> 'Metric | None':
    """The difference item by item, whose error is that of the difference.

    None if the items differ, as windows of two tokenizers do, or where a
    difference has no meaning, as of perplexities.
    """
    if self.is_exponential or not np.array_equal(self.sizes, other.sizes):
      return None
    return Metric(self.parts - other.parts, self.sizes)


@dataclasses.dataclass(frozen=True)
class Choices:
  """One question as it was scored; arrays have one entry for each choice.

  Attributes:
    logprobs: sums S in nats.
    chars: characters of each choice, without the delimiter before it.
    num_bytes: of UTF-8, likewise.
    num_tokens: that were scored.
    scored_bytes: with the delimiter, and spaces at the end of the context.
    gold: index of the right one.
    are_greedy: whether temperature 0 would write it.
    unconditional: sums without the question; None if they were not asked for.
  """

  logprobs: Sequence[float]
  chars: Sequence[int]
  num_bytes: Sequence[int]
  num_tokens: Sequence[int]
  scored_bytes: Sequence[int]
  gold: int
  are_greedy: Sequence[bool]
  unconditional: Sequence[float] | None = None


def of_questions(questions: Sequence[Choices]) -> dict[str, Metric]:
  """Metrics of multiple choice, or of completions with one choice each."""
  bits = [bits_per_byte(q) for q in questions]
  if len(questions[0].logprobs) == 1:
    right = [float(q.are_greedy[0]) for q in questions]
    nats = [-q.logprobs[0] for q in questions]
    return {
      'acc': Metric.mean(right, chance=0.0),
      'perplexity': Metric.mean(nats, is_exponential=True),
      'bits_per_byte': Metric.mean(bits),
    }
  chance = float(np.mean([1 / len(q.logprobs) for q in questions]))
  names = ['acc', 'acc_norm', 'acc_bytes', 'acc_per_token']
  if all(q.unconditional is not None for q in questions):
    names.append('acc_pmi')
  picked = [picks(q) for q in questions]
  found = {
    name: Metric.mean(
      [
        float(p[name] == q.gold) for p, q in zip(picked, questions, strict=True)
      ],
      chance=chance,
    )
    for name in names
  }
  return found | {'bits_per_byte': Metric.mean(bits)}


def picks(question: Choices) -> dict[str, int]:
  """Which choice each of the accuracies takes; of equal ones the first."""
  sums = np.array(question.logprobs)
  scores = {
    'acc': sums,
    'acc_norm': sums / np.maximum(question.chars, 1),
    'acc_bytes': sums / np.maximum(question.num_bytes, 1),
    'acc_per_token': sums / np.array(question.num_tokens),
  }
  if question.unconditional is not None:
    scores['acc_pmi'] = sums - np.array(question.unconditional)
  return {name: int(np.argmax(of)) for name, of in scores.items()}


def bits_per_byte(question: Choices) -> float:
  """Of the right answer: smooth where accuracies are at chance."""
  gold = question.gold
  return -question.logprobs[gold] / (question.scored_bytes[gold] * math.log(2))


def of_texts(
  logprobs: Sequence[float], num_bytes: Sequence[int], num_words: int
) -> dict[str, Metric]:
  """Metrics of long texts, of which items are windows.

  Args:
    logprobs: of each window in nats.
    num_bytes: of the text that it scores.
    num_words: of all texts.
  """
  nats = -np.array(logprobs, np.float64)
  sizes = np.array(num_bytes, np.float64)
  # Windows have no words of their own, so each has its share by bytes.
  words = sizes * (num_words / np.sum(sizes))
  return {
    'bits_per_byte': Metric(nats / math.log(2), sizes),
    'byte_perplexity': Metric(nats, sizes, is_exponential=True),
    'word_perplexity': Metric(nats, words, is_exponential=True),
  }


def to_json(metrics: Mapping[str, Metric]) -> dict[str, dict]:
  return {
    name: {
      'value': metric.value,
      'stderr': metric.error,
      **({} if metric.chance is None else {'chance': metric.chance}),
    }
    for name, metric in metrics.items()
  }
