# SPDX-License-Identifier: Apache-2.0
"""Emoji as pairs: pictures of a colour font, names and groups of Unicode.

The font is one with bitmaps (its table CBDT), as Noto Color Emoji is. A
sequence of code points is one glyph by the font's ligatures. Names, groups and
sub-groups are those of Unicode's `emoji-test.txt`, further captions those of
CLDR's annotations. Nothing is drawn: the font's own PNG files are written out.
"""

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from jaxsparse.config.errors import UserError
from jaxsparse.data.pictures.folder import CAPTIONS, IMAGES

# Asks for a picture instead of a letter; fonts and CLDR leave it out.
_VARIATION = '\ufe0f'
_LINE = re.compile(
  r'(?P<points>[0-9A-F ]+?)\s*;\s*fully-qualified\s*'
  r'#\s*\S+\s+E\d+\.\d+\s+(?P<name>.+)'
)
_PNG = b'\x89PNG\r\n\x1a\n'
_LIGATURE, _EXTENSION = 4, 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emoji:
  """One fully-qualified emoji of Unicode's list."""

  text: str
  name: str
  group: str
  subgroup: str

  @property
  def bare(self) -> str:
    return self.text.replace(_VARIATION, '')

  @property
  def file_name(self) -> str:
    return f'{"-".join(f"{ord(c):04x}" for c in self.text)}.png'


def names(path: pathlib.Path) -> list[Emoji]:
  """The emoji of `emoji-test.txt`, in its order.

  Raises:
    UserError: it can't be read, or is another file.
  """
  found, group, subgroup = [], '', ''
  for line in _text(path).splitlines():
    if line.startswith('# group:'):
      group = line.partition(':')[2].strip()
    elif line.startswith('# subgroup:'):
      subgroup = line.partition(':')[2].strip()
    elif match := _LINE.fullmatch(line.strip()):
      points = match['points'].split()
      found.append(
        Emoji(
          text=''.join(chr(int(point, 16)) for point in points),
          name=match['name'],
          group=group,
          subgroup=subgroup,
        )
      )
  if not found:
    raise UserError(
      f"{str(path)!r} has no line of a fully-qualified emoji: give Unicode's "
      'emoji-test.txt.'
    )
  return found


def annotations(path: pathlib.Path) -> dict[str, list[str]]:
  """What a file of CLDR says of each emoji: its name there, its keywords.

  Raises:
    UserError: it can't be read, or is another file.
  """
  try:
    root = ElementTree.fromstring(_text(path))
  except ElementTree.ParseError as error:
    raise UserError(
      f"{str(path)!r} is no XML ({error}): give a file of CLDR's annotations, "
      'such as annotations/en.xml.'
    ) from error
  said: dict[str, list[str]] = {}
  for node in root.iter('annotation'):
    # Of keywords what stands between them says nothing.
    text = ' '.join((node.text or '').replace(' | ', ' ').split())
    # CLDR writes so that it has none of its own.
    if text and text != '↑↑↑':
      # Its name comes before its keywords.
      place = 0 if node.get('type') == 'tts' else 1
      said.setdefault(node.get('cp', ''), []).insert(place, text)
  if not said:
    raise UserError(
      f"{str(path)!r} has no annotation: give a file of CLDR's annotations, "
      'such as annotations/en.xml.'
    )
  return said


class Font:
  """The pictures of a colour font."""

  def __init__(self, path: pathlib.Path):
    """Opens the font.

    Raises:
      UserError: it can't be read, or has no bitmaps.
    """
    ttlib = _font_tools()
    try:
      font = ttlib.TTFont(path, lazy=True)
      tables = set(font.keys())
      if 'CBDT' in tables:
        self._bitmaps = font['CBDT'].strikeData[0]
        self._characters = font.getBestCmap()
        self._ligatures = _ligatures(font) if 'GSUB' in tables else {}
    except OSError as error:
      raise _unreadable(path, error) from error
    except Exception as error:
      raise UserError(
        f'{str(path)!r} is no sound font ({type(error).__name__}: {error}): '
        'give NotoColorEmoji.ttf.'
      ) from error
    if 'CBDT' not in tables:
      raise UserError(
        f'{str(path)!r} has no bitmaps (no table CBDT), as fonts of outlines '
        'do: give NotoColorEmoji.ttf, the one with bitmaps.'
      )

  def png(self, text: str) -> bytes | None:
    """The picture of a sequence without variations; None if there is none."""
    glyphs = tuple(self._characters.get(ord(c), '') for c in text)
    glyph = glyphs[0] if len(glyphs) == 1 else self._ligatures.get(glyphs)
    bitmap = self._bitmaps.get(glyph)
    content = bytes(getattr(bitmap, 'imageData', b''))
    return content if content.startswith(_PNG) else None


def _ligatures(font: Any) -> Mapping[tuple[str, ...], str]:
  found = {}
  for lookup in font['GSUB'].table.LookupList.Lookup:
    for table in lookup.SubTable:
      if table.LookupType == _EXTENSION:
        table = table.ExtSubTable
      if table.LookupType != _LIGATURE:
        continue
      for first, options in table.ligatures.items():
        for option in options:
          found[(first, *option.Component)] = option.LigGlyph
  return found


def write(
  folder: pathlib.Path,
  font: Font,
  emoji: Sequence[Emoji],
  said: Sequence[Mapping[str, Sequence[str]]] = (),
) -> tuple[int, list[Emoji]]:
  """Writes the pairs of a font as `pictures.folder` reads them.

  The first caption is Unicode's name. What CLDR says is a caption too, unless
  it says the same of several emoji, as "flag" of each flag.

  Args:
    folder: there, and empty.
    font: has the pictures.
    emoji: all that are to be written.
    said: of annotations, file by file.

  Returns:
    How many pairs have a further caption, and the emoji that the font lacks.

  Raises:
    UserError: the font has none of them.
  """
  images = folder / IMAGES
  images.mkdir()
  captions = list(_captions(emoji, said))
  missing, lines, num_more = [], [], 0
  for one, more in zip(emoji, captions, strict=True):
    picture = font.png(one.bare)
    if picture is None:
      missing.append(one)
      continue
    (images / one.file_name).write_bytes(picture)
    num_more += bool(more)
    record = dict(
      image=one.file_name,
      captions=[one.name, *more],
      group=one.subgroup,
      category=one.group,
      emoji=one.text,
    )
    lines.append(json.dumps(record, ensure_ascii=False))
  if not lines:
    raise UserError(
      'the font has a picture of none of the emoji: give NotoColorEmoji.ttf.'
    )
  # Last: a folder without it is no folder of pairs.
  content = ''.join(f'{line}\n' for line in lines)
  (folder / CAPTIONS).write_text(content, encoding='utf-8')
  return num_more, missing


def _captions(
  emoji: Sequence[Emoji], said: Sequence[Mapping[str, Sequence[str]]]
) -> Iterator[list[str]]:
  """What annotations say of each, but for names and what others have too."""
  found = [
    dict.fromkeys(
      text
      for of_file in said
      for text in of_file.get(one.bare, of_file.get(one.text, ()))
      if text.casefold() != one.name.casefold()
    )
    for one in emoji
  ]
  counts = Counter(text for texts in found for text in texts)
  for texts in found:
    yield [text for text in texts if counts[text] == 1]


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text('utf-8')
  except OSError as error:
    raise _unreadable(path, error) from error
  except UnicodeDecodeError as error:
    raise UserError(
      f'{str(path)!r} is not UTF-8: give another file.'
    ) from error


def _unreadable(path: pathlib.Path, error: OSError) -> UserError:
  return UserError(
    f'{str(path)!r} cannot be read ({error.strerror or error}): give the path '
    'of a file.'
  )


def _font_tools() -> Any:
  try:
    from fontTools import ttLib
  except ImportError as error:
    raise UserError(
      "reading a font needs fontTools: pip install 'jaxsparse[train]'."
    ) from error
  return ttLib
