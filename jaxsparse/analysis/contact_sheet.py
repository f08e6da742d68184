# SPDX-License-Identifier: Apache-2.0
"""Pictures in rows with a text below each; weights drawn over a picture."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxsparse.run import workdir

# Pixels of a picture's side, of the space around it, and of a line of text.
_SIDE, _SPACE, _LINE = 128, 12, 15
# Lines below a picture.
_LINES = 2
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
    pictures: uint8 [S, S, 3].
    titles: what stands below each; what does not fit in two lines is cut off.
    columns: pictures in a row.
    heading: a line above all.

  Raises:
    OSError: it can't be written.
  """
  columns = min(columns, len(pictures))
  rows = -(-len(pictures) // columns)
  width, height = _SIDE + _SPACE, _SIDE + _LINES * _LINE + _SPACE
  top = _SPACE + (_LINE + _SPACE // 2 if heading else 0)
  sheet = Image.new(
    'RGB', (columns * width + _SPACE, rows * height + top), 'white'
  )
  pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
  pen.text((_SPACE, _SPACE // 2), heading, 'black', font)
  for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
    x, y = _SPACE + i % columns * width, top + i // columns * height
    tile = Image.fromarray(picture).resize(
      (_SIDE, _SIDE), Image.Resampling.BICUBIC
    )
    sheet.paste(tile, (x, y))
    pen.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE), outline='#cccccc')
    for j, line in enumerate(_wrapped(title, pen, font)):
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


def _wrapped(title, pen, font) -> list[str]:
  """Lines of at most the picture's width."""
  lines = ['']
  for word in title.split():
    longer = f'{lines[-1]} {word}'.strip()
    if pen.textlength(longer, font) <= _SIDE or not lines[-1]:
      lines[-1] = longer
    else:
      lines.append(word)
  if len(lines) > _LINES:
    lines[_LINES - 1] += ' ...'
  return lines[:_LINES]
