# SPDX-License-Identifier: Apache-2.0
"""The one scorer: log-likelihoods of pairs and texts, and greedy texts."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.evaluation.encoding import (
  Encoded,
  encode_pair,
  rolling_windows,
)
from jaxsparse.evaluation.programs import score
from jaxsparse.inference import batch
from jaxsparse.inference.text import Request, encode_prompt

BATCH_TOKENS = 16_384

# Shorter rows would make one more program for little.
_SHORTEST = 16


class Score(NamedTuple):
  """What the model makes of the last tokens of a sequence."""

  # Sum in nats.
  logprob: float
  # Whether each was the likeliest token: what temperature 0 would write.
  is_greedy: bool


class Scorer:
  """Scores by one model, on the mesh in use or on one device.

  A score depends on its own sequence alone, up to the order of sums: not on
  what else is scored, nor on the size of batches.

  Attributes:
    tokenizer: of the model.
    max_length: tokens that it reads at most.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: dict,
    tokenizer: Any,
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
  ):
    """Keeps the model.

    Args:
      config: with vocab_size set, or the tokenizer's size is taken.
      params: on one device, or placed on the mesh that is in use.
      tokenizer: with which the model was trained.
      max_length: tokens of a sequence, such as in training.
      batch_tokens: tokens of a batch, padding among them.

    Raises:
      UserError: a number is below 1.
    """
    for name, value in dict(
      max_len=max_length, batch_tokens=batch_tokens
    ).items():
      flag = name.replace('_', '-')
      require(value >= 1, f'--{flag} must be at least 1, got {value}.')
    self.tokenizer, self.max_length = tokenizer, max_length
    self._config = config.with_vocabulary(tokenizer.vocab_size)
    self._params = params
    self._batch_tokens = batch_tokens

  def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores of continuations after their contexts, in the order given.

    Raises:
      UserError: see `encode_pair`.
    """
    return self.scores(
      [encode_pair(self.tokenizer, *pair, self.max_length) for pair in pairs]
    )

  def rolling(self, texts: Sequence[str]) -> list[float]:
    """Log-probabilities of whole texts in nats, each token scored once."""
    windows = [
      [*rolling_windows(encode_prompt(self.tokenizer, text), self.max_length)]
      for text in texts
    ]
    scores = iter(self.scores([w for of_text in windows for w in of_text]))
    return [sum(next(scores).logprob for _ in of_text) for of_text in windows]

  def scores(self, sequences: Sequence[Encoded]) -> list[Score]:
    """Scores of what is encoded, in the order given."""
    found = dict(self.in_batches(sequences))
    return [found[i] for i in range(len(sequences))]

  def in_batches(
    self, sequences: Sequence[Encoded]
  ) -> Iterator[tuple[int, Score]]:
    """Scores as they come, longest sequences first: index and score."""
    pending = collections.deque()
    for indices, length, num_rows in self._plan(sequences):
      rows = [sequences[i] for i in indices]
      pending.append((indices, self._run(rows, length, num_rows)))
      # The device has the next batch before the host waits for this one.
      if len(pending) > 1:
        yield from _read(*pending.popleft())
    while pending:
      yield from _read(*pending.popleft())

  def generate(self, requests: Sequence[Request]) -> list[str]:
    """Texts that continue the prompts, each cut before its first stop string.

    Raises:
      UserError: memory has no room, or the mesh in use splits batches.
    """
    require(
      mesh.axis_sizes() is None,
      'texts are written on one device: give --devices=1.',
    )
    if not requests:
      return []
    programs = batch.prepare(
      self._config, self._params, self.tokenizer, requests, self.max_length
    )
    done = batch.complete_all(programs, self.tokenizer, requests)
    return [completion.text for completion in done]

  def _plan(
    self, sequences: Sequence[Encoded]
  ) -> Iterator[tuple[list[int], int, int]]:
    """Batches: which sequences, of how many columns, and of how many rows.

    Those of one bucket have one shape, and so one program.
    """
    shards = mesh.num_token_shards()
    buckets = collections.defaultdict(list)
    for i, sequence in enumerate(sequences):
      columns = 1 << (sequence.length - 1).bit_length()
      buckets[max(columns, _SHORTEST)].append(i)
    for columns in sorted(buckets, reverse=True):
      indices = sorted(
        buckets[columns], key=lambda i: sequences[i].length, reverse=True
      )
      needed = 1 << (len(indices) - 1).bit_length()
      num_rows = min(needed, max(1, self._batch_tokens // columns))
      num_rows = -(-num_rows // shards) * shards
      for begin in range(0, len(indices), num_rows):
        yield indices[begin : begin + num_rows], columns, num_rows

  def _run(
    self, sequences: list[Encoded], columns: int, num_rows: int
  ) -> tuple[jax.Array, jax.Array]:
    tokens = np.zeros((num_rows, columns), np.int32)
    targets = np.zeros_like(tokens)
    counts = np.zeros((2, num_rows), np.int32)
    for row, sequence in enumerate(sequences):
      tokens[row, : sequence.length] = sequence.tokens[:-1]
      targets[row, : sequence.length] = sequence.tokens[1:]
      counts[:, row] = sequence.length, sequence.num_targets
    arrays = [tokens, targets, *counts]
    if (spec := mesh.act('B')) is not None:
      sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
      arrays = [jax.device_put(a, sharding) for a in arrays]
    return score(self._config, self._params, *arrays)


def _read(
  indices: list[int], scores: tuple[jax.Array, jax.Array]
) -> Iterator[tuple[int, Score]]:
  for i, logprob, is_greedy in zip(
    indices, *(np.asarray(a).tolist() for a in scores), strict=False
  ):
    if not np.isfinite(logprob):
      raise UserError(
        'the model gives probabilities that are no numbers: its weights or its '
        'activations have left the range of their type.'
      )
    yield i, Score(logprob, is_greedy)
