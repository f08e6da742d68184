# SPDX-License-Identifier: Apache-2.0
"""Pictures of a collection at one size, decoded once.

Decoding costs more than the rest of a batch, and a broken picture is better
found before training than after hours of it. So all are decoded at the first
start, and kept beside the corpus unless they would fill the disk.
"""

import contextlib
import pathlib
from collections.abc import Callable

import numpy as np

from jaxsparse.data import builder
from jaxsparse.data.percent import Percent
from jaxsparse.data.pictures.pair import Pair
from jaxsparse.data.pieces import Corpus

# Those of more are decoded once to find broken ones, and then whenever they are
# read.
MOST_BYTES = 1 << 32

Read = Callable[[int], np.ndarray]


def num_frames(corpus: Corpus, size: int) -> int:
  """Pictures of each item: 1, or the frames of a video.

  Args:
    corpus: of pairs.
    size: the pictures' side.

  Raises:
    UserError: the first one is broken.
  """
  shape = corpus.pictures.picture(corpus.train[0].number, size).shape
  return shape[0] if len(shape) == 4 else 1


def reader(
  corpus: Corpus, size: int, say: Callable[[str], None] = print
) -> Read:
  """Gives the picture of a number, uint8 [S, S, 3] or frames [F, S, S, 3].

  Args:
    corpus: of pairs.
    size: the pictures' side S.
    say: gets lines on the progress.

  Raises:
    UserError: a picture is broken, or they can't be kept.
  """
  collection = corpus.pictures
  pairs = [
    pair
    for split in (corpus.train, corpus.validation, corpus.test)
    for pair in split or ()
  ]

  def decoded(number: int) -> np.ndarray:
    return collection.picture(number, size)

  first = decoded(pairs[0].number)
  if collection.is_drawn:
    return decoded
  if first.nbytes * len(pairs) > MOST_BYTES:
    _check(corpus.directory / f'checked_{size}', pairs, decoded, say)
    return decoded
  path = corpus.directory / f'pictures_{size}.npy'
  rows = {
    pair.number: row
    for row, pair in enumerate(sorted(pairs, key=lambda pair: pair.number))
  }
  shape = (len(pairs), *first.shape)
  # Of several processes one decodes.
  lock = path.with_suffix('.lock')
  with builder.user_errors(corpus.directory), builder.locked(lock):
    kept = _kept(path, shape)
    if kept is None:
      _decode(path, shape, rows, decoded, say)
      kept = _kept(path, shape)
  return lambda number: kept[rows[number]]


def _check(
  path: pathlib.Path,
  pairs: list[Pair],
  decoded: Read,
  say: Callable[[str], None],
) -> None:
  """Decodes all pictures, once: then the file is there."""
  lock = path.with_suffix('.lock')
  with builder.user_errors(path.parent), builder.locked(lock):
    if path.exists():
      return
    percent = Percent('Checking the pictures', len(pairs), say)
    for number, pair in enumerate(pairs):
      percent.reach(number)
      decoded(pair.number)
    path.touch()


def _kept(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray | None:
  # A damaged file costs time only.
  with contextlib.suppress(OSError, ValueError, EOFError):
    kept = np.load(path, mmap_mode='r')
    if kept.shape == shape and kept.dtype == np.uint8:
      return np.asarray(kept)
  return None


def _decode(
  path: pathlib.Path,
  shape: tuple[int, ...],
  rows: dict[int, int],
  decoded: Read,
  say: Callable[[str], None],
) -> None:
  percent = Percent('Decoding the pictures', len(rows), say)
  # Whole or not there: a kill may come at any time.
  partial = path.with_suffix('.partial')
  try:
    made = np.lib.format.open_memmap(partial, 'w+', np.uint8, shape)
    for number, row in rows.items():
      percent.reach(row)
      made[row] = decoded(number)
    made.flush()
    del made
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
