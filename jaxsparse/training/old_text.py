# SPDX-License-Identifier: Apache-2.0
"""The text that a run's model knew before, by which forgetting is measured."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from etils import epath

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError, require
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.run import checkpoint, run_config, start
from jaxsparse.training import inputs


def beside(
  config: Config,
  corpus: Corpus,
  tokens: Tokenizer,
  workdir: epath.PathLike,
  say: Callable[[str], None],
) -> Corpus:
  """The corpus with the text that was learned before, where that is known.

  It is that of data.replay; else what the run was trained on whose parameters
  this one begins with. No more of its validation part than train.old_text_bytes
  stays.

  Args:
    config: of the run.
    corpus: of the run.
    tokens: its tokenizer.
    workdir: of the run.
    say: gets a sentence if there was a text and it can't be measured.
  """
  before = corpus.before
  # Rows are ranked by it, too.
  is_used = config.train.old_text_bytes or config.adapter.kind == 'rows'
  if before is None and is_used:
    before = _of_start(config, corpus, tokens, workdir, say)
  if before is not None:
    before = _measured(before, config.train.old_text_bytes, say)
  return dataclasses.replace(corpus, before=before)


def _of_start(
  config: Config,
  corpus: Corpus,
  tokens: Tokenizer,
  workdir: epath.PathLike,
  say: Callable[[str], None],
) -> Corpus | None:
  """The text of the run that this one begins with, where it is another."""
  begun_from = start.settled(config, workdir)
  if begun_from is None:
    return None
  try:
    before = _text_of(begun_from.workdir, config, tokens, say)
  except UserError as error:
    say(f'What is forgotten is not measured, as {error}')
    return None
  if before is None:
    say(
      f'What is forgotten is not measured, as {begun_from.workdir!r} does not '
      'know its text: name one by data.replay, with data.replay_share=0 if it '
      'is not to be mixed in.'
    )
  # More of the same text forgets nothing.
  is_same = before is not None and before.key == corpus.key
  return None if is_same else before


def _measured(
  before: Corpus, most_bytes: int, say: Callable[[str], None]
) -> Corpus:
  """The corpus with about as much validation text, in pieces taken evenly.

  The whole may take longer to read than the run takes to train.
  """
  pieces, total = before.validation, before.validation_bytes
  if total <= most_bytes:
    return before
  number = min(len(pieces), math.ceil(len(pieces) * most_bytes / total))
  places = np.arange(number) * len(pieces) // max(number, 1)
  chosen = [pieces[i] for i in places.tolist()]
  num_bytes = sum(len(piece.text) for piece in chosen)
  if chosen:
    say(
      f'Of the text that was learned before {num_bytes:,} of {total:,} bytes '
      'are measured (train.old_text_bytes).'
    )
  return dataclasses.replace(
    before, validation=chosen, validation_bytes=num_bytes
  )


def _text_of(
  workdir: str, config: Config, tokens: Tokenizer, say: Callable[[str], None]
) -> Corpus | None:
  """What a workdir's run was trained on; None if no run was."""
  record = checkpoint.read_record(workdir) or {}
  if 'data' not in record:
    return None
  data = run_config.read(workdir, say).data
  data = dataclasses.replace(
    data,
    replay='',
    replay_share=0.0,
    chat_template='',
    seq_len=config.data.seq_len,
    align=1,
    cache_dir=config.data.cache_dir,
  )
  found = build_corpus(data, say)
  require(
    found.key == record['data']['corpus'],
    f'the text that {workdir!r} was trained on has changed.',
  )
  return inputs.with_answers(data, found, tokens, workdir, say)[0]
