# SPDX-License-Identifier: Apache-2.0
"""The configuration of what is read: text, tokenizer and batches."""

import dataclasses
import functools
import math

from jaxsparse.config import fields
from jaxsparse.config.augment import AugmentConfig
from jaxsparse.config.errors import (
  require,
  require_choice,
  require_fraction,
  require_not_negative,
  require_positive,
  require_unset,
)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DataConfig:
  """Text, tokenizer and batches; with no text named, Python's own sources."""

  # The user's text: files, folders and globs, separated by commas; here or on
  # gs:// and the like. Plain UTF-8, one document a file; JSON lines (.jsonl,
  # .ndjson) and parquet, one a record. All but parquet may be compressed (.gz,
  # .bz2, .xz, .zst).
  text: str = ''
  # Field of JSON lines, column of parquet files that holds the text.
  text_field: str = 'text'
  # Chats instead of text, of which the answers are learned: files as `text` has
  # them, JSON lines of {"messages": [{"role": ..., "content": ...}, ...]}.
  messages: str = ''
  # File with the template of chats, in Jinja; '' for that of the model.
  chat_template: str = ''
  # Text that was learned before and is not to be forgotten, as `text` has it.
  # Its validation share is measured beside that of the new text.
  replay: str = ''
  # Share of the rows that are of `replay`; 0 only measures it.
  replay_share: float = 0.05
  # Pictures with captions instead of text: a folder of pictures with a
  # captions.jsonl, .tar files as webdataset has them, 'tfds:NAME' (a TensorFlow
  # Dataset with pictures and texts), or what is drawn: 'generated:shapes',
  # 'generated:four_shapes' or 'generated:frames'.
  pairs: str = ''
  # What of the pairs is held out: 'random' ones, or whole groups ('group').
  held_out: str = 'random'
  # Pairs whose first caption has these words in it are left out.
  without: str = ''
  # Whether one of a pair's distractors, drawn anew in each epoch, is a wrong
  # text for its picture, besides those of the batch.
  distractors: bool = False
  # Of pairs of a TensorFlow Dataset: name of the feature of pictures.
  image_feature: str = 'image'
  # How the pictures of pairs are changed from epoch to epoch.
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
  # Name of a TensorFlow Dataset, such as 'lm1b'.
  tfds: str = ''
  # Name of the dataset's text feature; of pairs it may hold several texts, and
  # lie within another ('captions/text').
  tfds_feature: str = 'text'
  # Splits of the dataset, in TFDS's slicing syntax.
  tfds_train_split: str = 'train'
  tfds_validation_split: str = 'test'
  # How text files are split: 'file' (whole files), 'bytes' (train, validation,
  # test in this order, as enwik8 is split) or 'auto': by file where that gives
  # about the shares below, else by bytes.
  split: str = 'auto'
  # Shares of validation and test; the rest is for training.
  validation_fraction: float = 0.05
  test_fraction: float = 0.0
  # Where built corpora are kept.
  cache_dir: str = '~/.cache/jaxsparse'
  # 'bytes', 'bpe' (trained on the corpus), 'words' (those of the captions of
  # data.pairs), or the path of a tokenizer.json or of a SentencePiece model.
  tokenizer: str = 'bytes'
  # Size of the vocabulary that 'bpe' trains.
  bpe_vocab_size: int = 8192
  # Tokens T of one packed sequence.
  seq_len: int = 256
  # Pieces begin in a row at multiples of it, after padding, a divisor of
  # seq_len: with a sparse attention's block no document shares one with another
  # and packed documents are as if apart. 1 packs without gaps.
  align: int = 1
  # Sequences B of one optimizer step, over all devices.
  batch_size: int = 16
  # Independent packing streams of which the batch is made; the stream of
  # batches is the same for any number of processes that divides it. 0: the
  # greatest common divisor of batch_size and 256.
  num_lanes: int = 0
  # Batches that are prepared ahead.
  prefetch: int = 4

  def __post_init__(self):
    fields.check(self)
    names = ('text', 'tfds', 'messages', 'pairs')
    given = [n for n in names if getattr(self, n)]
    require(
      len(given) < 2,
      f'give one of text, tfds, messages and pairs, not {" and ".join(given)}.',
    )
    require_choice(self, 'split', ('auto', 'file', 'bytes'))
    require(
      bool(self.text_field)
      and (bool(self.text or self.replay) or self.text_field == 'text'),
      'text_field must name the field of text in the records of data.text '
      f'(of data.tfds, tfds_feature does); got {self.text_field!r}.',
    )
    require_positive(self, 'seq_len', 'batch_size', 'bpe_vocab_size', 'align')
    require(
      self.seq_len % self.align == 0,
      f'align must divide seq_len = {self.seq_len}, got {self.align}.',
    )
    require_fraction(self, 'validation_fraction', 'test_fraction')
    require_fraction(self, 'replay_share')
    require(
      self.replay_share < 1,
      f'replay_share must be below 1, got {self.replay_share}.',
    )
    require(
      self.validation_fraction > 0
      and self.validation_fraction + self.test_fraction < 1,
      'validation_fraction must be above 0, and below 1 together with '
      f'test_fraction; got {self.validation_fraction} and '
      f'{self.test_fraction}.',
    )
    require_not_negative(self, 'prefetch')
    require(
      self.bpe_vocab_size > 256,
      'bpe_vocab_size must be above 256, one token for each byte; '
      f'got {self.bpe_vocab_size}.',
    )
    require(
      self.num_lanes >= 0 and self.batch_size % (self.num_lanes or 1) == 0,
      f'num_lanes must divide batch_size = {self.batch_size}, '
      f'got {self.num_lanes}.',
    )
    unset = functools.partial(require_unset, self)
    is_tfds = bool(self.tfds) or self.pairs.startswith('tfds:')
    unset(
      not is_tfds,
      'no tfds',
      'tfds_feature',
      'tfds_train_split',
      'tfds_validation_split',
    )
    unset(
      is_tfds or self.pairs == 'generated:frames',
      f'tfds = {self.tfds!r}, which has splits of its own'
      if self.tfds
      else f'pairs = {self.pairs!r}, which has splits of its own',
      'split',
      'validation_fraction',
      'test_fraction',
      'held_out',
    )
    self._check_pairs(is_tfds)
    unset(bool(self.messages), f'messages = {self.messages!r}', 'split')
    unset(not self.messages, 'no messages', 'chat_template')
    unset(not self.replay, 'no replay', 'replay_share')
    require(
      not (self.messages and self.tokenizer == 'bpe'),
      "tokenizer = 'bpe' can't be trained on messages: name one of a model, or "
      "'bytes'.",
    )
    is_given = self.tokenizer != 'bpe'
    unset(is_given, f'tokenizer = {self.tokenizer!r}', 'bpe_vocab_size')

  def _check_pairs(self, is_tfds: bool):
    require_choice(self, 'held_out', ('random', 'group'))
    unset = functools.partial(require_unset, self)
    unset(not self.pairs, 'no pairs', 'held_out', 'without', 'distractors')
    unset(not (self.pairs and is_tfds), 'no tfds pairs', 'image_feature')
    if not self.pairs:
      require(
        self.augment == AugmentConfig(),
        'augment changes pictures, of which there are none without pairs: '
        'leave it at its defaults.',
      )
      require(
        self.tokenizer != 'words',
        "tokenizer = 'words' is of the captions of pairs: give pairs, or "
        "another tokenizer, such as 'bpe'.",
      )
      return
    require_unset(
      self.augment,
      self.tokenizer != 'words',
      f'data.tokenizer = {self.tokenizer!r}',
      'unknown',
    )
    why = f'pairs = {self.pairs!r}'
    unset(True, why, 'split', 'replay', 'align')

  @property
  def lanes(self) -> int:
    """Number of packing streams in use."""
    return self.num_lanes or math.gcd(self.batch_size, 256)
