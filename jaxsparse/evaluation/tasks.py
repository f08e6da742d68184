# SPDX-License-Identifier: Apache-2.0
"""Tasks: what is to be scored, and what the scores come to."""

import collections
import dataclasses
import glob
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

from jaxsparse.config.errors import UserError, require
from jaxsparse.evaluation import metrics, questions
from jaxsparse.evaluation.encoding import (
  Encoded,
  continuation_of,
  encode_pair,
  rolling_windows,
)
from jaxsparse.evaluation.metrics import Metric
from jaxsparse.evaluation.questions import Question
from jaxsparse.evaluation.scorer import Score, Scorer
from jaxsparse.inference.text import encode_prompt, read_file
from jaxsparse.run import workdir

# Tokens of a text that are read at once unless a flag says so: memory for
# attention may grow with the square.
_WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class Encodings:
  """What of a task one model is given.

  Attributes:
    sequences: to be scored.
    labels: of each, what it is called in the file of items.
    num_items: questions, or texts.
    num_cut: those of whose contexts something is cut off.
  """

  sequences: list[Encoded]
  labels: list[dict]
  num_items: int
  num_cut: int = 0


class Task(Protocol):
  """What `run.evaluate` needs of a task."""

  name: str

  @property
  def settings(self) -> dict:
    """On what its scores depend besides the model; anything JSON can hold."""

  def encode(self, scorer: Scorer) -> Encodings:
    """What is to be scored, by the tokenizer and length of a model."""

  def measure(
    self, encodings: Encodings, scores: Sequence[Score], tokenizer: Any
  ) -> dict[str, Metric]:
    """What the scores of all sequences come to."""


@dataclasses.dataclass(frozen=True)
class QuestionTask:
  """Questions of one file, of multiple choice or with one answer each."""

  name: str
  questions: list[Question]
  sha256: str

  @classmethod
  def read(cls, name: str, path: pathlib.Path, limit: int | None = None):
    found, sha256 = questions.read(path)
    return cls(_limited(name, len(found), limit), found[:limit], sha256)

  @property
  def settings(self) -> dict:
    return dict(requests_sha256=self.sha256, num_questions=len(self.questions))

  def encode(self, scorer: Scorer) -> Encodings:
    sequences, labels, num_cut = [], [], 0
    for question in self.questions:
      num_choices, is_cut = len(question.choices), False
      for i, pair in enumerate(question.pairs):
        label = dict(id=question.id, choice=i % num_choices)
        if i >= num_choices:
          label['unconditional'] = True
        try:
          encoded = encode_pair(scorer.tokenizer, *pair, scorer.max_length)
        except UserError as error:
          raise UserError(
            f'question {question.id} of {self.name}: {error}'
          ) from error
        is_cut |= encoded.num_cut > 0
        sequences.append(encoded)
        labels.append(label)
      num_cut += is_cut
    return Encodings(sequences, labels, len(self.questions), num_cut)

  def measure(
    self, encodings: Encodings, scores: Sequence[Score], tokenizer: Any
  ) -> dict[str, Metric]:
    del tokenizer
    found, begin = [], 0
    for question in self.questions:
      count = len(question.choices)
      own = slice(begin, begin + count)
      begin += len(question.pairs)
      without = [s.logprob for s in scores[own.stop : begin]]
      found.append(
        metrics.Choices(
          logprobs=[s.logprob for s in scores[own]],
          chars=[len(c) for c in question.choices],
          num_bytes=[len(c.encode()) for c in question.choices],
          num_tokens=[s.num_targets for s in encodings.sequences[own]],
          scored_bytes=[
            len(continuation_of(*pair).encode())
            for pair in question.pairs[:count]
          ],
          gold=question.gold,
          are_greedy=[s.is_greedy for s in scores[own]],
          unconditional=without or None,
        )
      )
    return metrics.of_questions(found)


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Bits per byte of whole texts, window by window."""

  name: str
  texts: list[str]
  window: int | None = None
  stride: int | None = None

  @classmethod
  def read(
    cls,
    pattern: str,
    window: int | None,
    stride: int | None,
    limit: int | None = None,
  ):
    """The texts of the files that a pattern names, the first `limit` of them.

    Raises:
      UserError: there is none, or one is empty or can't be read.
    """
    # Not pathlib's, which knows no pattern from the root.
    found = glob.glob(workdir.expanded(pattern), recursive=True)  # noqa: PTH207
    paths = sorted(path for path in found if pathlib.Path(path).is_file())
    if not paths:
      raise UserError(f'--text={pattern} names no file.')
    texts = [read_file('--text=', path) for path in paths[:limit]]
    for path, text in zip(paths, texts, strict=False):
      if not text:
        raise UserError(f'--text={path} is empty: leave it out.')
    name = _limited(pattern, len(paths), limit)
    return cls(name, texts, window, stride)

  @property
  def settings(self) -> dict:
    hashes = [hashlib.sha256(t.encode()).hexdigest() for t in self.texts]
    return dict(
      requests_sha256=hashlib.sha256(' '.join(hashes).encode()).hexdigest(),
      window=self.window,
      stride=self.stride,
    )

  def encode(self, scorer: Scorer) -> Encodings:
    window = self.window or min(scorer.max_length, _WINDOW)
    require(
      1 <= window <= scorer.max_length,
      f'--window must be within 1 and the {scorer.max_length} tokens that the '
      f'model reads, got {window}: see --max-len.',
    )
    sequences, labels = [], []
    for number, text in enumerate(self.texts):
      tokens = encode_prompt(scorer.tokenizer, text)
      windows = rolling_windows(tokens, window, self.stride)
      for i, encoded in enumerate(windows):
        sequences.append(encoded)
        labels.append(dict(text=number, window=i))
    return Encodings(sequences, labels, len(self.texts))

  def measure(
    self, encodings: Encodings, scores: Sequence[Score], tokenizer: Any
  ) -> dict[str, Metric]:
    sizes = [
      len(tokenizer.decode_bytes(s.targets)) for s in encodings.sequences
    ]
    last, spelled = {}, collections.Counter()
    for i, (label, size) in enumerate(
      zip(encodings.labels, sizes, strict=True)
    ):
      last[label['text']] = i
      spelled[label['text']] += size
    for number, text in enumerate(self.texts):
      # What a tokenizer spells otherwise, as a space before the first word.
      sizes[last[number]] += len(text.encode()) - spelled[number]
    num_words = sum(len(re.split(r'\s+', text)) for text in self.texts)
    return metrics.of_texts([s.logprob for s in scores], sizes, num_words)


def _limited(name: str, count: int, limit: int | None) -> str:
  """A name of its own for a part: what is left of the whole stays."""
  is_whole = limit is None or limit >= count
  return name if is_whole else f'{name} (first {limit})'
