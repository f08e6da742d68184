# SPDX-License-Identifier: Apache-2.0
"""What a run reads: Python's sources, files, a TFDS dataset, chats, pairs."""

import contextlib
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterator

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import (
  builder,
  chats,
  documents,
  named_dataset,
  python_text,
  splits,
  survey,
)
from jaxsparse.data.percent import Percent
from jaxsparse.data.pictures import split as pairs
from jaxsparse.data.pieces import Corpus

Say = Callable[[str], None]


def build_corpus(config: DataConfig, say: Say = print) -> Corpus:
  """Opens the corpus that `config` names; builds it the first time.

  Args:
    config: names the text and where built corpora are kept.
    say: gets a line for each step that takes long.

  Returns:
    The corpus; the same text, split in the same way, gives the same one.

  Raises:
    UserError: the text is missing, empty, not UTF-8 or too small, the dataset
      is unknown or out of reach, or data.cache_dir cannot be used.
  """
  corpora = _corpora_folder(config)
  if config.tfds:
    corpus = _from_named_dataset(config, corpora, say)
  elif config.pairs:
    with _named('data.pairs'):
      return pairs.read(config, corpora, say)
  elif config.messages:
    with _named('data.messages'):
      corpus = chats.read(config, corpora)
  else:
    corpus = _from_documents(config, corpora, say)
  if not config.replay:
    return corpus
  with _named('data.replay'):
    before = _from_documents(_of_replay(config), corpora, say)
  return dataclasses.replace(corpus, before=before)


def whole_collection(
  config: DataConfig, setting: str = 'data.pairs', say: Say = print
) -> Corpus:
  """All pairs of data.pairs as one split, of which nothing is held out.

  Args:
    config: names the pairs and where built corpora are kept.
    setting: where the user named them, for errors.
    say: gets lines on what takes long.

  Raises:
    UserError: they can't be read, or data.cache_dir cannot be used.
  """
  with _named(setting):
    return pairs.whole(config, _corpora_folder(config), say)


def _of_replay(config: DataConfig) -> DataConfig:
  """The config of the text that was learned before alone."""
  plain = DataConfig()
  return dataclasses.replace(
    plain,
    text=config.replay,
    text_field=config.text_field,
    validation_fraction=config.validation_fraction,
    cache_dir=config.cache_dir,
  )


@contextlib.contextmanager
def _named(setting: str) -> Iterator[None]:
  """Text files of another setting than data.text, which errors name."""
  try:
    yield
  except UserError as error:
    sentence = re.sub(r'\bdata\.(text|tfds|pairs)\b', setting, str(error))
    raise UserError(sentence) from error


def _corpora_folder(config: DataConfig) -> pathlib.Path:
  try:
    if '://' in config.cache_dir or '\0' in config.cache_dir:
      raise ValueError
    folder = pathlib.Path(config.cache_dir).expanduser() / 'corpora'
    # The writer of ArrayRecord takes no other names.
    str(folder).encode()
  # No such user, or no UTF-8.
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'data.cache_dir = {config.cache_dir!r} must be a local directory with a '
      'name in UTF-8.'
    ) from error
  return folder


def _from_documents(
  config: DataConfig, corpora: pathlib.Path, say: Say
) -> Corpus:
  texts = _documents(config)
  identities = survey.identities(texts, say)
  with builder.user_errors(corpora / builder.MANIFEST):
    found = survey.survey(texts, identities, corpora, say)
  if found.like_json:
    first, *more = found.like_json
    others = f' and {len(more):,} more' if more else ''
    say(
      f"Read as plain text, with JSON's punctuation: {first!r}{others}; for "
      'their texts alone give JSON lines (.jsonl) and data.text_field.'
    )
  split = splits.kind(texts, found.sizes, config)
  if config.split == 'auto' and split == 'bytes':
    number = 'one file' if len(texts) == 1 else f'{len(texts):,} files'
    say(
      f'Of {number}, none can be left whole to validate near the wanted share: '
      "the text's last part does, as with data.split='bytes'."
    )
  key = builder.content_key(identities, split, config)
  directory = corpora / key
  if not builder.is_built(directory):
    config = dataclasses.replace(config, split=split)
    builder.build(splits.split(texts, found.sizes, config), directory, say)
  sources, facts = builder.read(directory)
  for name, (number, num_bytes) in facts['equal_documents'].items():
    say(
      f'Documents of {name} that are in training too: {number:,} '
      f'({num_bytes / facts["num_bytes"][name]:.2%} of its bytes).'
    )
  return Corpus(
    key=key,
    directory=directory,
    train=sources['train'],
    validation=sources['validation'],
    test=sources.get('test'),
    validation_bytes=facts['num_bytes']['validation'],
  )


def _documents(config: DataConfig) -> list[documents.Document]:
  if not config.text:
    return python_text.documents()
  texts = documents.match(config.text, config.text_field)
  if config.text_field != 'text' and not any(t.text_field for t in texts):
    raise UserError(
      f'data.text_field = {config.text_field!r} is in no file of data.text = '
      f'{config.text!r}: give JSON lines (.jsonl) or parquet files with it.'
    )
  return texts


def _from_named_dataset(
  config: DataConfig, corpora: pathlib.Path, say: Say
) -> Corpus:
  train, validation, name = named_dataset.read(config, say)
  digest = hashlib.sha256(
    repr(
      (name, config.tfds_feature, config.tfds_train_split, len(train))
    ).encode()
  )
  validation_bytes = 0
  percent = Percent('Hashing the validation text', len(validation), say)
  for number, piece in enumerate(validation):
    percent.reach(number)
    digest.update(piece.text)
    validation_bytes += len(piece.text)
  if not validation_bytes:
    raise UserError(
      f'data.tfds_validation_split = {config.tfds_validation_split!r} of '
      f'{config.tfds!r} holds only empty texts: name another split.'
    )
  key = digest.hexdigest()[:24]
  directory = corpora / key
  with builder.user_errors(directory):
    directory.mkdir(parents=True, exist_ok=True)
  return Corpus(
    key=key,
    directory=directory,
    train=train,
    validation=validation,
    test=None,
    validation_bytes=validation_bytes,
  )
