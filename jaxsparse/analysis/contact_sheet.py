# SPDX-License-Identifier: Apache-2.0
"""Pictures in rows with a text below each; weights drawn over a picture."""

import bisect
import contextlib
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxsparse.run import workdir

# Pictures that a sheet is still looked at with.
MOST = 240

# Pixels of a picture's side, of the space around it, and of a line of text.
_SIDE, _SPACE, _LINE = 128, 12, 15
# Lines below a picture, and most above all of them.
_LINES, _HEADING = 2, 4
_LETTERS = 11
# Where a text is looked at: the pixels' share that is left in the dark.
_DARK = 0.2


def draw(
  path: pathlib.Path,
  pictures: Sequence[np.ndarray],
  titles: Sequence[str],
  columns: int = 6,
  heading: str = '',
) -> None:
  """Writes a PNG.

  Args:
    path: of the file.
    pictures: uint8 [S, S, 3]; `MOST` are plenty.
    titles: what stands below each; what does not fit in two lines is cut off.
    columns: pictures in a row.
    heading: what stands above all, in four lines at most.

  Raises:
    OSError: it can't be written.
  """
  columns = min(columns, len(pictures))
  rows = -(-len(pictures) // columns)
  width, height = _SIDE + _SPACE, _SIDE + _LINES * _LINE + _SPACE
  font = _font([heading, *titles])
  above = _wrapped(heading, columns * width - _SPACE, _HEADING, font)
  top = _SPACE + len(above) * _LINE + (_SPACE // 2 if above else 0)
  sheet = Image.new(
    'RGB', (columns * width + _SPACE, rows * height + top), 'white'
  )
  pen = ImageDraw.Draw(sheet)
  for j, line in enumerate(above):
    pen.text((_SPACE, _SPACE // 2 + j * _LINE), line, 'black', font)
  for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
    x, y = _SPACE + i % columns * width, top + i // columns * height
    tile = Image.fromarray(picture).resize(
      (_SIDE, _SIDE), Image.Resampling.BICUBIC
    )
    sheet.paste(tile, (x, y))
    pen.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE), outline='#cccccc')
    for j, line in enumerate(_wrapped(title, _SIDE, _LINES, font)):
      pen.text((x, y + _SIDE + 2 + j * _LINE), line, 'black', font)
  workdir.make_folder(path.parent)
  sheet.save(path, 'PNG')


def looked_at(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """The picture, darker where a text does not look, uint8 [S, S, 3].

  Args:
    picture: uint8 [S, S, 3].
    weights: of the patches, [grid, grid]; the largest is shown bright.
  """
  side = len(picture)
  light = Image.fromarray((weights / weights.max() * 255).astype(np.uint8))
  light = light.resize((side, side), Image.Resampling.BICUBIC)
  share = _DARK + (1 - _DARK) * np.asarray(light, np.float32)[..., None] / 255
  return (picture * share).astype(np.uint8)


def _wrapped(
  text: str, width: int, most: int, font: ImageFont.FreeTypeFont
) -> list[str]:
  """The text in lines that are no wider; a word that is wider is broken."""

  def fitting(end: str = '') -> int:
    return bisect.bisect_right(
      range(1, len(rest) + 1),
      width,
      key=lambda size: font.getlength(rest[:size] + end),
    )

  # What an argument holds may be no UTF-8.
  rest = ' '.join(text.encode('utf-8', 'replace').decode().split())
  lines = []
  while rest and len(lines) < most:
    size = fitting()
    if size < len(rest) and len(lines) == most - 1:
      return [*lines, rest[: fitting(' ...')].rstrip() + ' ...']
    if size < len(rest) and (space := rest.rfind(' ', 0, size + 1)) > 0:
      size = space
    lines.append(rest[: max(size, 1)].rstrip())
    rest = rest[max(size, 1) :].lstrip()
  return lines


def _font(texts: Iterable[str]) -> ImageFont.FreeTypeFont:
  """One of this machine that has most letters, if it can that of matplotlib."""
  # Slow to import, and only needed when something is drawn.
  from matplotlib import font_manager, ft2font, get_data_path

  wanted = {ord(x) for text in texts for x in text if not x.isspace()}

  def lacks(path: str) -> float:
    try:
      return len(wanted - ft2font.FT2Font(path).get_charmap().keys())
    # One that is known here and gone, or is broken.
    except (OSError, RuntimeError):
      return math.inf

  path = str(pathlib.Path(get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'))
  if lacks(path):
    # Matplotlib's last resort has a box for everything.
    others = {
      font.fname
      for font in font_manager.fontManager.ttflist
      if 'Last Resort' not in font.name
    }
    for other in sorted([path, *sorted(others)], key=lacks):
      # Some have pixels of one size alone.
      with contextlib.suppress(OSError):
        return ImageFont.truetype(other, _LETTERS)
  return ImageFont.truetype(path, _LETTERS)
