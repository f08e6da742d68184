# SPDX-License-Identifier: Apache-2.0
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
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import pieces, splits
from jaxsparse.data.equal_documents import EqualDocuments
from jaxsparse.data.percent import Percent

MANIFEST = 'corpus.json'

# Raised when the same documents would be stored in another way.
_FORMAT = 1


class TextCorpus(tfds.core.GeneratorBasedBuilder):
  """Documents in pieces, in their order."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    spans: splits.Splits,
    equal: EqualDocuments,
    percent: Percent,
    **kwargs,
  ):
    # Training comes last: of its documents `equal` keeps nothing.
    order = sorted(spans, key=lambda name: name == 'train')
    self._spans = {name: spans[name] for name in order if spans[name]}
    self._equal = equal
    self._percent = percent
    self._num_bytes = 0
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
      name: self._generate_examples(name, spans)
      for name, spans in self._spans.items()
    }

  def _generate_examples(self, name, spans):
    key = 0
    for span in spans:
      for text, ends_document in self._equal.watch(
        name, span.document.read(span.start, span.stop)
      ):
        yield key, {'text': text, 'ends_document': ends_document}
        key += 1
        self._num_bytes += len(text)
        self._percent.reach(self._num_bytes)


def content_key(
  identities: Sequence[list[str]], split: str, config: DataConfig
) -> str:
  """A name for exactly these documents, split in exactly this way.

  Args:
    identities: of the documents, in their order.
    split: 'file' or 'bytes'.
    config: gives the shares.
  """
  parts = [_FORMAT, pieces.PIECE_BYTES, split]
  parts += [config.validation_fraction, config.test_fraction]
  parts += identities
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def is_built(directory: pathlib.Path) -> bool:
  with user_errors(directory):
    return (directory / MANIFEST).exists()


def build(
  spans: splits.Splits,
  directory: pathlib.Path,
  say: Callable[[str], None],
) -> None:
  """Writes the splits to `directory`, unless another process has done so.

  Raises:
    UserError: the directory cannot be written or the disk is full.
  """
  num_bytes = {
    name: sum(span.num_bytes for span in some) for name, some in spans.items()
  }
  total = sum(num_bytes.values())
  with user_errors(directory), locked(directory.with_suffix('.lock')):
    if is_built(directory):
      return
    _require_space(directory.parent, 2 * total)
    say(f'Building a corpus of {total:,} bytes ...')
    # What lies here was left by a build that was killed: we hold the lock.
    partial = directory.with_suffix('.partial')
    for stale in (partial, directory):
      shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    equal = EqualDocuments()
    _write(
      TextCorpus(
        spans,
        equal,
        Percent('Building the corpus', total, _aloud(say)),
        data_dir=partial,
        file_format='array_record',
      )
    )
    facts = dict(num_bytes=num_bytes, equal_documents=equal.found)
    (partial / MANIFEST).write_text(json.dumps(facts))
    partial.rename(directory)


def read(directory: pathlib.Path) -> tuple[dict[str, pieces.Pieces], dict]:
  """The splits of the corpus in `directory`, and what is known of them.

  Returns:
    The splits, and under 'num_bytes' the bytes of each; under
    'equal_documents' what `EqualDocuments` found, empty where a former version
    built the corpus.

  Raises:
    UserError: files are damaged or missing.
  """
  try:
    facts = json.loads((directory / MANIFEST).read_text())
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
  return sources, dict(dict(equal_documents={}), **facts)


def _write(builder: TextCorpus) -> None:
  tfds.display_progress_bar(False)
  # TFDS prints what it downloads and that one need not do so again.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _aloud(say: Callable[[str], None]) -> Callable[[str], None]:
  """Says it on the present standard output, also where that is redirected."""
  stdout = sys.stdout

  def say_aloud(text: str) -> None:
    with contextlib.redirect_stdout(stdout):
      say(text)

  return say_aloud


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
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
