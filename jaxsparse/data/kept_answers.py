# SPDX-License-Identifier: Apache-2.0
"""Chats that were made into tokens, kept beside their corpus.

Of each split there are arrays of all its sequences one after another, and the
length of each.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse.data.pieces import Answers

Splits = dict[str, list[Answers]]

# Raised when the same chats would be other tokens.
_FORMAT = 1

# What a file that is cut off or damaged ends in.
_TROUBLES = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def file_of(directory: pathlib.Path, *identity: Any) -> pathlib.Path:
  """Where they are kept.

  Args:
    directory: of the corpus.
    *identity: all that the tokens depend on besides, as JSON can hold it.
  """
  text = json.dumps([_FORMAT, *identity])
  digest = hashlib.sha256(text.encode()).hexdigest()[:24]
  return directory / f'answers_{digest}.npz'


def write(file: pathlib.Path, splits: Splits, facts: dict[str, int]) -> None:
  """Keeps them, where the folder can be written."""
  arrays: dict[str, Any] = {}
  arrays['facts'] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
  for name, of in splits.items():
    texts = [np.frombuffer(x.text, np.uint8) for x in of]
    arrays[f'{name}/lengths'] = np.array([len(x.tokens) for x in of], np.int64)
    arrays[f'{name}/tokens'] = _joined([x.tokens for x in of], np.int32)
    arrays[f'{name}/is_learned'] = _joined([x.is_learned for x in of], bool)
    arrays[f'{name}/text_lengths'] = np.array([*map(len, texts)], np.int64)
    arrays[f'{name}/text'] = _joined(texts, np.uint8)
  # A cache that others share may be closed to us.
  with contextlib.suppress(OSError):
    # A reader must never see half a file.
    partial = file.with_suffix(f'.{os.getpid()}')
    with partial.open('wb') as opened:
      np.savez(opened, **arrays)
    partial.replace(file)


def read(file: pathlib.Path) -> tuple[Splits, dict[str, int]] | None:
  """What `write` got; None if it is not there, or damaged."""
  try:
    with np.load(file) as found:
      arrays = dict(found)
    facts = json.loads(arrays.pop('facts').tobytes())
    names = dict.fromkeys(name.partition('/')[0] for name in arrays)
    return {name: _split(arrays, name) for name in names}, facts
  except _TROUBLES:
    return None


def _split(arrays: dict[str, np.ndarray], name: str) -> list[Answers]:
  def cut(array: str, lengths: str) -> list[np.ndarray]:
    ends = np.cumsum(arrays[f'{name}/{lengths}'])
    return np.split(arrays[f'{name}/{array}'], ends[:-1]) if len(ends) else []

  parts = (
    cut('tokens', 'lengths'),
    cut('is_learned', 'lengths'),
    cut('text', 'text_lengths'),
  )
  return [
    Answers(tokens, is_learned, text.tobytes())
    for tokens, is_learned, text in zip(*parts, strict=True)
  ]


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
  return np.concatenate([np.zeros(0, dtype), *arrays])
