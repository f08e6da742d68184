"""The text of a run: Python's own, the user's files, or a TFDS dataset."""

import hashlib
import pathlib
from collections.abc import Callable

from jaxsparse.config import DataConfig
from jaxsparse.data import builder, documents, named_dataset, python_text
from jaxsparse.data.pieces import Corpus
from jaxsparse.errors import UserError


def build_corpus(
  config: DataConfig, say: Callable[[str], None] = print
) -> Corpus:
  """Opens the corpus that `config` names; builds it the first time.

  Args:
    config: names the text and where built corpora are kept.
    say: is told, one line at a time, what takes long.

  Returns:
    The corpus; the same text, split in the same way, gives the same one.

  Raises:
    UserError: the text is missing, empty, not UTF-8 or too small, the dataset
      is unknown or out of reach, or data.cache_dir cannot be used.
  """
  if '://' in config.cache_dir:
    raise UserError(
      f'data.cache_dir = {config.cache_dir!r} must be a local directory.'
    )
  corpora = pathlib.Path(config.cache_dir).expanduser() / 'corpora'
  if config.tfds:
    return _from_named_dataset(config, corpora, say)
  return _from_documents(config, corpora, say)


def _from_documents(
  config: DataConfig, corpora: pathlib.Path, say: Callable[[str], None]
) -> Corpus:
  texts = (
    documents.match(config.text) if config.text else python_text.documents()
  )
  key = builder.content_key(texts, config)
  directory = corpora / key
  if not builder.is_built(directory):
    sizes = [documents.measure(document) for document in texts]
    builder.build(documents.split(texts, sizes, config), directory, say)
  sources, num_bytes = builder.read(directory)
  return Corpus(
    key=key,
    directory=directory,
    train=sources['train'],
    validation=sources['validation'],
    test=sources.get('test'),
    validation_bytes=num_bytes['validation'],
  )


def _from_named_dataset(
  config: DataConfig, corpora: pathlib.Path, say: Callable[[str], None]
) -> Corpus:
  train, validation, name = named_dataset.read(config, say)
  digest = hashlib.sha256(
    repr(
      (name, config.tfds_feature, config.tfds_train_split, len(train))
    ).encode()
  )
  validation_bytes = 0
  for piece in validation:
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
