# SPDX-License-Identifier: Apache-2.0
"""Pairs as batches: endless to train, one pass to validate.

As of text (`data.pipeline`), the stream is the same for any number of
processes, and goes on exactly where a saved state stood. Which caption of a
pair is taken and how its picture is changed hang on the seed, the pair and the
epoch, and on nothing else.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import packing, pipeline
from jaxsparse.data.pictures import stored
from jaxsparse.data.pictures.augment import augmented, scaled
from jaxsparse.data.pictures.pair import Pair
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.pipeline import Batch, TrainIterator
from jaxsparse.data.tokenizer import Tokenizer

# Of rows that fill a last batch up.
PADDING = -1

# Stands for characters that can't be read, and so in no caption.
_UNKNOWN = '\ufffd'


class _Drawn(NamedTuple):
  """A pair in one epoch."""

  pair: Pair
  epoch: int


def train_iterator(
  config: DataConfig,
  corpus: Corpus,
  tokenizer: Tokenizer,
  seed: int,
  read: stored.Read,
  process_index: int = 0,
  process_count: int = 1,
) -> TrainIterator:
  """The rows of `process_index` of the endless stream of batches.

  A batch has 'images', float32 [B, S, S, 3] from -1 to 1, or frames
  [B, F, S, S, 3]; 'tokens', 'targets', 'positions', 'segment_ids', int32
  [B, T], and 'loss_weight', float32 [B, T], of one caption a row with padding
  of segment 0 behind it; and 'item', int32 [B]: pairs that are right for each
  other have one number. With data.distractors there are 'wrong_tokens' and
  'wrong_segment_ids', int32 [B, T], of one of each pair's distractors.

  Args:
    config: of the run.
    corpus: of pairs.
    tokenizer: of the captions.
    seed: of order, captions and changes.
    read: of `stored.reader`, which knows the pictures' size.
    process_index: of `process_count`.
    process_count: all processes.

  Raises:
    UserError: the processes do not divide the lanes, or a batch would have a
      pair twice.
  """
  number = len(corpus.train)
  if config.batch_size > number:
    raise UserError(
      f'data.batch_size = {config.batch_size:,} must be at most {number:,}, '
      'the pairs to train on, as those of a batch are compared.'
    )

  def row(drawn: _Drawn) -> dict[str, np.ndarray]:
    pair = drawn.pair
    rng = np.random.default_rng([seed, pair.number, drawn.epoch])
    caption = pair.captions[int(rng.integers(len(pair.captions)))]
    if config.augment.unknown:
      caption = _half_known(caption, config.augment.unknown, rng)
    picture = augmented(read(pair.number), config.augment, rng)
    made = _row(config, tokenizer, pair, caption, picture)
    if config.distractors:
      made |= _wrong_row(config, tokenizer, pair, rng)
    return made

  pairs = pipeline.shuffled(corpus.train, seed).map_with_index(
    lambda index, pair: _Drawn(pair, index // number)
  )

  def make_lane(lane: int, num_lanes: int) -> grain.DatasetIterator:
    rows = pairs[slice(lane, None, num_lanes)].map(row)
    # The batches are made in a thread of their own already.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(rows.to_iter_dataset(options))

  identity = dict(corpus=corpus.key, seed=seed)
  return pipeline.in_lanes(
    config, identity, make_lane, process_index, process_count
  )


def validation_batches(
  config: DataConfig,
  pairs: Any,
  tokenizer: Tokenizer,
  read: stored.Read,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """One pass over pairs in order, each with its first caption, unchanged.

  Every process gets the same number of batches of B / process_count rows. Rows
  that fill the last one up are zero, and their item is -1.

  Raises:
    UserError: the processes do not divide the batch.
  """
  owned = pipeline.owned_rows(config, process_count)
  padding = None
  for batch in range(math.ceil(len(pairs) / config.batch_size)):
    first = batch * config.batch_size + process_index * owned
    rows = []
    for i in range(first, first + owned):
      if i < len(pairs):
        pair = pairs[i]
        caption, picture = pair.captions[0], scaled(read(pair.number))
        rows.append(_row(config, tokenizer, pair, caption, picture))
      else:
        padding = padding or _padding(config, pairs[0], tokenizer, read)
        rows.append(padding)
    yield packing.stack(rows)


def candidate_batches(
  config: DataConfig,
  pairs: Sequence[Pair],
  tokenizer: Tokenizer,
  read: stored.Read,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[list[Batch]]:
  """Pairs that have distractors, each batch once with each of its captions.

  The first has the right captions. Where a pair has fewer distractors than
  others, its row is padding. Arguments as those of `validation_batches`.
  """
  pairs = [pair for pair in pairs if pair.distractors]
  owned = pipeline.owned_rows(config, process_count)
  most = max((len(pair.distractors) for pair in pairs), default=0)
  for batch in range(math.ceil(len(pairs) / config.batch_size)):
    first = batch * config.batch_size + process_index * owned
    own = pairs[first : first + owned]
    padding = _padding(config, pairs[0], tokenizer, read)
    pictures = [scaled(read(pair.number)) for pair in own]
    candidates = []
    for place in range(most + 1):
      rows = [padding] * owned
      for i, (pair, picture) in enumerate(zip(own, pictures, strict=True)):
        captions = (pair.captions[0], *pair.distractors)
        if place < len(captions):
          rows[i] = _row(config, tokenizer, pair, captions[place], picture)
      candidates.append(packing.stack(rows))
    yield candidates


def text_row(
  config: DataConfig, tokenizer: Tokenizer, caption: str, prompt: str = ''
) -> dict[str, np.ndarray]:
  """A caption as the text arrays of a row, each [T].

  Its targets are its tokens and the boundary behind them. Those of the prompt
  have no weight in the loss. What does not fit into a row is cut off; see
  `tell_of_long_captions`.
  """
  given = tokenizer.encode(prompt).tolist() if prompt else []
  said = tokenizer.encode(caption).tolist()
  sequence = [tokenizer.begin_id, *given, *said, tokenizer.boundary_id]
  sequence = sequence[: config.seq_len + 1]
  length = len(sequence) - 1
  names = ('tokens', 'targets', 'positions', 'segment_ids')
  row = {name: np.zeros(config.seq_len, np.int32) for name in names}
  row['tokens'][:length] = sequence[:-1]
  row['targets'][:length] = sequence[1:]
  row['positions'][:length] = np.arange(length)
  row['segment_ids'][:length] = 1
  weight = np.zeros(config.seq_len, np.float32)
  weight[len(given) : length] = 1
  return dict(row, loss_weight=weight)


def row_length(tokenizer: Tokenizer, caption: str) -> int:
  """Tokens of a row that has the whole caption, and no prompt before it."""
  # With what begins it, as the boundary is a target alone.
  return 1 + len(tokenizer.encode(caption))


def tell_of_long_captions(
  config: DataConfig,
  corpus: Corpus,
  tokenizer: Tokenizer,
  say: Callable[[str], None] = print,
) -> None:
  """Says how many captions a row cuts off.

  Raises:
    UserError: with prompts, nothing of an answer is left of one.
  """
  longest = number = total = 0
  for pair in (*corpus.train, *corpus.validation, *(corpus.test or ())):
    given = len(tokenizer.encode(pair.prompt))
    for caption in pair.captions:
      length = given + row_length(tokenizer, caption)
      longest, total = max(longest, length), total + 1
      number += length > config.seq_len
    if given >= config.seq_len:
      raise UserError(
        f'data.seq_len = {config.seq_len} is too short for the prompt of '
        f'{pair.name!r}, which has {given} tokens: raise it.'
      )
  if number:
    say(
      f'Captions longer than data.seq_len = {config.seq_len} tokens: '
      f'{number:,} of {total:,} (up to {longest:,}), of which the end is not '
      'read.'
    )


def _row(
  config: DataConfig,
  tokenizer: Tokenizer,
  pair: Pair,
  caption: str,
  picture: np.ndarray,
) -> dict[str, np.ndarray]:
  return dict(
    images=picture,
    **text_row(config, tokenizer, caption, pair.prompt),
    item=np.int32(pair.item),
  )


def _half_known(caption: str, share: float, rng: np.random.Generator) -> str:
  """The caption with words in it that no vocabulary has."""
  words = caption.split()
  is_known = rng.random(len(words)) >= share
  return ' '.join(
    word if known else _UNKNOWN
    for word, known in zip(words, is_known, strict=True)
  )


def _wrong_row(
  config: DataConfig,
  tokenizer: Tokenizer,
  pair: Pair,
  rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """One of the pair's distractors; all 0 where there is none."""
  some = pair.distractors
  wrong = some[int(rng.integers(len(some)))] if some else ''
  said = text_row(config, tokenizer, wrong, pair.prompt)
  return {
    f'wrong_{name}': said[name] * bool(some)
    for name in ('tokens', 'segment_ids')
  }


def _padding(
  config: DataConfig, pair: Pair, tokenizer: Tokenizer, read: stored.Read
) -> dict[str, np.ndarray]:
  row = _row(config, tokenizer, pair, '', scaled(read(pair.number)))
  zeros = {name: np.zeros_like(x) for name, x in row.items()}
  return dict(zeros, item=np.int32(PADDING))
