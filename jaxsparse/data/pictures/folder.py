# SPDX-License-Identifier: Apache-2.0
"""Pairs in a folder: `captions.jsonl`, and pictures in `images/` or beside it.

Each line is of one picture:

  {"image": "cat.png", "caption": "a cat"}
  {"image": "dog.jpg", "captions": ["a dog", "an animal"], "group": "pets"}

or, with "frames": ["1.png", "2.png"], of a video, all of as many frames.
"""

import hashlib
import pathlib
from typing import Any

import numpy as np

from jaxsparse.config.errors import UserError, shown
from jaxsparse.data import records
from jaxsparse.data.pictures import captions, decode
from jaxsparse.data.pictures.pair import Pair

CAPTIONS = 'captions.jsonl'
IMAGES = 'images'


class Folder:
  """The pairs of a folder; pictures are read when they are asked for."""

  is_drawn = False

  def __init__(self, path: pathlib.PurePath):
    """Reads the captions.

    Raises:
      UserError: a line is wrong, or a picture is missing or named twice.
    """
    self._path = path
    images = path / IMAGES
    self._images = images if images.is_dir() else path
    self.pairs: list[Pair] = []
    # Names of each pair's frames; of a picture one.
    self._frames: list[tuple[str, ...]] = []
    self._is_video = None
    lines: dict[tuple[str, ...], str] = {}
    taken: set[str] = set()
    try:
      raw = (path / CAPTIONS).open('rb')
    except OSError as error:
      raise UserError(
        f'{str(path / CAPTIONS)!r} cannot be read '
        f'({error.strerror or error}): let it be read.'
      ) from error
    with raw:
      for line, record in records.json_lines(raw, path / CAPTIONS):
        place = f'{line} of {str(path / CAPTIONS)!r}'
        fields = captions.fields_of(record, place)
        names = self._names(record, place)
        if names in lines:
          raise UserError(
            f'{place} names {", ".join(map(repr, names))}, as {lines[names]} '
            f'does: give all captions of a {self._item} in one line, as '
            '"captions": ["...", "..."].'
          )
        lines[names] = line
        # Videos may begin alike. No folder has the name of a picture.
        name = '/'.join(names) if names[0] in taken else names[0]
        taken.add(name)
        self.pairs.append(Pair(name=name, number=len(self.pairs), **fields))
        self._frames.append(names)
    captions.require_pairs(self.pairs, str(path))
    self._require_files(lines)

  @property
  def _item(self) -> str:
    return 'video' if self._is_video else 'picture'

  def digest(self, number: int) -> str:
    whole = hashlib.sha256()
    for name in self._frames[number]:
      whole.update(hashlib.sha256(self._bytes(name)).digest())
    return whole.hexdigest()

  def picture(self, number: int, size: int) -> np.ndarray:
    frames = [
      decode.read_picture(self._bytes(name), size, str(self._images / name))
      for name in self._frames[number]
    ]
    return np.stack(frames) if len(frames) > 1 else frames[0]

  def _bytes(self, name: str) -> bytes:
    try:
      return (self._images / name).read_bytes()
    except OSError as error:
      raise UserError(
        f'{str(self._images / name)!r} cannot be read '
        f'({error.strerror or error}): bring it back, or leave its line out of '
        f'{CAPTIONS}.'
      ) from error

  def _names(self, record: dict[str, Any], place: str) -> tuple[str, ...]:
    given = [name for name in ('image', 'frames') if name in record]
    if len(given) != 1:
      which = 'both "image" and "frames"' if given else 'no "image"'
      raise UserError(f'{place} has {which}: name its picture, as "image".')
    found = record[given[0]]
    names = [found] if given == ['image'] else found
    if not (isinstance(names, list) and names) or not all(
      isinstance(name, str) and name for name in names
    ):
      raise UserError(
        f'{given[0]!r} in {place} must name '
        f'{"a picture" if given == ["image"] else "a list of pictures"}, got '
        f'{shown(found)}.'
      )
    for name in names:
      path = pathlib.PurePosixPath(name)
      if path.is_absolute() or '..' in path.parts or '\0' in name:
        raise UserError(
          f'{place} names {name!r}, which must lie in {str(self._images)!r}: '
          'give its name there.'
        )
    is_video = given == ['frames']
    number = len(names)
    wanted = len(self._frames[0]) if self._frames else number
    if self._is_video not in (None, is_video) or number != wanted:
      raise UserError(
        f'{place} has {number} {given[0]}, unlike the first line'
        f'{f" with {wanted}" if is_video and self._is_video else ""}: give '
        'pictures alone, or videos of as many frames each.'
      )
    self._is_video = is_video
    # Without './' and the like.
    return tuple(str(pathlib.PurePosixPath(name)) for name in names)

  def _require_files(self, lines: dict[tuple[str, ...], str]) -> None:
    named = {name for names in self._frames for name in names}
    there = _those_there(self._images, named)
    missing = [
      (lines[names], name)
      for names in self._frames
      for name in names
      if name not in there
    ]
    if missing:
      line, name = missing[0]
      more = f' and {len(missing) - 1:,} more' if len(missing) > 1 else ''
      raise UserError(
        f'{line} of {str(self._path / CAPTIONS)!r} names {name!r}{more}, not '
        f'found in {str(self._images)!r}: bring it there, or leave its line '
        'out.'
      )


def _those_there(folder: Any, names: set[str]) -> set[str]:
  """Those of the names, such as 'a/b.png', that are in the folder.

  Each of their folders is listed once, which costs less than asking for each
  name where files lie elsewhere; no other is, as links may go in circles.

  Raises:
    UserError: a folder cannot be read.
  """
  found = set()
  for parent in {str(pathlib.PurePosixPath(name).parent) for name in names}:
    prefix = '' if parent == '.' else f'{parent}/'
    try:
      found |= {f'{prefix}{path.name}' for path in (folder / parent).iterdir()}
    except (FileNotFoundError, NotADirectoryError):
      continue
    except OSError as error:
      raise UserError(
        f'{str(folder / parent)!r} cannot be read ({error.strerror or error}): '
        'let it be read.'
      ) from error
  return found & names
