# SPDX-License-Identifier: Apache-2.0
"""The texts by which rows are ranked: a run's own, and what its base knows."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.data import pipeline
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.training.micro_batches import Batch
from jaxsparse.training.trained_rows import Texts


def of_run(config: Config, corpus: Corpus, tokens: Tokenizer) -> Texts | None:
  """What `trained_rows` ranks by; None of a run that trains no rows.

  Args:
    config: of the run.
    corpus: of it, with the text that was learned before.
    tokens: of the model.
  """
  if config.adapter.kind != 'rows':
    return None
  return Texts(
    functools.partial(_passed, config, corpus, tokens),
    functools.partial(_passed, config, corpus.before, tokens),
  )


def _passed(
  config: Config, corpus: Corpus | None, tokens: Tokenizer
) -> Iterable[Batch]:
  """This process's rows of one pass over a training split.

  Raises:
    UserError: there is no such text.
  """
  if corpus is None:
    # A run that has its rows does without it.
    raise UserError(
      "adapter.kind = 'rows' ranks rows against a text that the base knows: "
      'name one by data.replay, with data.replay_share=0 if it is not to be '
      'mixed in.'
    )
  shuffled = dataclasses.replace(corpus, validation=_Shuffled(corpus.train))
  return pipeline.validation_batches(
    config.data,
    shuffled,
    tokens,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


class _Shuffled(Sequence[Any]):
  """Pieces in another order, so that the first ones tell of all."""

  def __init__(self, pieces: Sequence[Any]):
    self._pieces = pieces
    self._order = np.random.default_rng(0).permutation(len(pieces))

  def __len__(self) -> int:
    return len(self._pieces)

  def __getitem__(self, index: Any) -> Any:
    return self._pieces[int(self._order[index])]
