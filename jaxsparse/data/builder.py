"""Documents written once as a TensorFlow Dataset of ArrayRecord files.

A corpus lies in a directory named by the hash of its content. It is built
beside its place and moved there when it is whole, so that a build that was
killed is never mistaken for a corpus.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from jaxsparse.config import DataConfig
from jaxsparse.data import documents as documents_lib
from jaxsparse.data import pieces
from jaxsparse.errors import UserError

FACTS = 'corpus.json'

# Raised when the same documents would be stored in another way.
_FORMAT = 1


class TextCorpus(tfds.core.GeneratorBasedBuilder):
  """Documents in pieces, in their order."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, splits: documents_lib.Splits, **kwargs):
    self._spans = {name: spans for name, spans in splits.items() if spans}
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      # Keeps the order of the documents.
      disable_shuffling=True,
      features=tfds.features.FeaturesDict(
        {
          'text': tfds.features.Text(),
          'ends_document': tfds.features.Scalar(dtype=np.bool_),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {
      name: self._generate_examples(spans)
      for name, spans in self._spans.items()
    }

  def _generate_examples(self, spans):
    key = 0
    for span in spans:
      with span.document.open() as stream:
        stream.seek(span.start)
        for text, is_last in pieces.cut(stream, span.stop - span.start):
          ends_document = is_last and span.ends_document
          yield key, {'text': text, 'ends_document': ends_document}
          key += 1


def content_key(
  documents: list[documents_lib.Document], config: DataConfig
) -> str:
  """A name for exactly these documents, split in exactly this way.

  Raises:
    UserError: a document cannot be read.
  """
  parts = [_FORMAT, pieces.PIECE_BYTES, config.split]
  parts += [config.validation_fraction, config.test_fraction]
  parts += [(document.name, document.digest()) for document in documents]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def is_built(directory: pathlib.Path) -> bool:
  with user_errors(directory):
    return (directory / FACTS).exists()


def build(
  splits: documents_lib.Splits,
  directory: pathlib.Path,
  say: Callable[[str], None],
) -> None:
  """Writes the splits to `directory`, unless another process has done so.

  Raises:
    UserError: the directory cannot be written or the disk is full.
  """
  num_bytes = {
    name: sum(span.stop - span.start for span in spans)
    for name, spans in splits.items()
  }
  with user_errors(directory), _locked(directory.with_suffix('.lock')):
    if is_built(directory):
      return
    _require_space(directory.parent, 2 * sum(num_bytes.values()))
    say(f'Building a corpus of {sum(num_bytes.values()):,} bytes ...')
    # What lies here was left by a build that was killed: we hold the lock.
    partial = directory.with_suffix('.partial')
    for stale in (partial, directory):
      shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    _write(splits, partial)
    (partial / FACTS).write_text(json.dumps(dict(num_bytes=num_bytes)))
    partial.rename(directory)


def read(directory: pathlib.Path) -> tuple[dict[str, pieces.Pieces], dict]:
  """The splits of the corpus in `directory`, and their sizes in bytes.

  Raises:
    UserError: files are damaged or missing.
  """
  try:
    facts = json.loads((directory / FACTS).read_text())
    builder = tfds.builder_from_directory(
      directory / TextCorpus.name / str(TextCorpus.VERSION)
    )
    sources = {
      name: pieces.Pieces(builder.as_data_source(split=name), 'text')
      for name in builder.info.splits
    }
    for source in sources.values():
      source[len(source) - 1]
  except Exception as error:
    raise UserError(
      f'the corpus in {str(directory)!r} is damaged: remove that directory, '
      'and it is built again.'
    ) from error
  return sources, facts['num_bytes']


def _write(splits: documents_lib.Splits, directory: pathlib.Path) -> None:
  tfds.display_progress_bar(False)
  # TFDS prints what it downloads and that one need not do so again.
  with contextlib.redirect_stdout(io.StringIO()):
    builder = TextCorpus(splits, data_dir=directory, file_format='array_record')
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock that the system lets go of when its holder dies."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def user_errors(directory: pathlib.Path) -> Iterator[None]:
  """Says in a sentence why a corpus cannot be kept in `directory`."""
  try:
    directory.parent.mkdir(parents=True, exist_ok=True)
    yield
  except UserError:
    raise
  except Exception as error:
    # The writers of ArrayRecord have exceptions of their own for this.
    if os.strerror(errno.ENOSPC) in str(error):
      raise UserError(
        f'no disk space for the corpus: {directory.parent} is full; free some, '
        'or name another data.cache_dir.'
      ) from error
    if not isinstance(error, OSError):
      raise
    raise UserError(
      f'data.cache_dir cannot be used: {directory.parent} is not writable '
      f'({error.strerror or error}); name a directory that is.'
    ) from error


def _require_space(directory: pathlib.Path, num_bytes: int) -> None:
  free = shutil.disk_usage(directory).free
  if free < num_bytes:
    raise UserError(
      f'no disk space for the corpus: {directory} has {free:,} bytes left and '
      f'{num_bytes:,} are needed; free some, or name another data.cache_dir.'
    )
