# SPDX-License-Identifier: Apache-2.0
"""What is found out about the user's text before it is split."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from jaxsparse.data.documents import Document
from jaxsparse.data.percent import Percent

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
  """Of each document in turn."""

  # Bytes of its text.
  sizes: list[int]
  # Names of those that are plain text to us and look like JSON.
  like_json: list[str]


def identities(documents: Sequence[Document], say: Say) -> list[list[str]]:
  """What identifies each document: name, content, field of text.

  Raises:
    UserError: a document cannot be read.
  """
  found = []
  for document, position in _in_turn(documents, 'Hashing the text', say):
    identity = [document.name, document.digest(position)]
    found.append(identity + [document.text_field] * bool(document.text_field))
  return found


def survey(
  documents: Sequence[Document],
  identities: Sequence[list[str]],
  folder: pathlib.Path,
  say: Say,
) -> Survey:
  """Reads all text, unless `folder` keeps what was found the last time.

  Raises:
    UserError: a document cannot be read, or holds no text.
  """
  key = hashlib.sha256(json.dumps(identities).encode()).hexdigest()[:24]
  cache = folder / f'{key}.survey.json'
  # A damaged file, or a folder that is closed to us, costs time only.
  with contextlib.suppress(OSError, ValueError, TypeError):
    kept = Survey(**json.loads(cache.read_text()))
    if len(kept.sizes) == len(documents):
      return kept
  sizes = [
    document.measure(position)
    for document, position in _in_turn(documents, 'Reading the text', say)
  ]
  like_json = [d.name for d in documents if d.looks_like_json()]
  found = Survey(sizes=sizes, like_json=like_json)
  with contextlib.suppress(OSError):
    partial = cache.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps(dataclasses.asdict(found)))
    partial.replace(cache)
  return found


def _in_turn(
  documents: Sequence[Document], doing: str, say: Say
) -> Iterator[tuple[Document, Callable[[int], None]]]:
  """Each document, and a function that gets the position within its file."""
  sizes = [document.num_file_bytes() for document in documents]
  percent = Percent(doing, sum(sizes), say)
  before = 0
  for document, size in zip(documents, sizes, strict=True):
    yield (
      document,
      lambda position, before=before: percent.reach(before + position),
    )
    before += size
