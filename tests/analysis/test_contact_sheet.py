# SPDX-License-Identifier: Apache-2.0
"""Texts stay below their pictures, in letters and not in boxes."""

import numpy as np
import pytest
from matplotlib import font_manager, ft2font
from PIL import Image

from jaxsparse.analysis import contact_sheet

COLOUR = (200, 120, 40)
PICTURE = np.full((16, 16, 3), COLOUR, np.uint8)


@pytest.fixture
def drawn(tmp_path):
  def draw(titles, heading=''):
    path = tmp_path / 'sheet.png'
    pictures = [PICTURE] * len(titles)
    contact_sheet.draw(path, pictures, titles, heading=heading)
    return np.asarray(Image.open(path)).astype(int)

  return draw


def tiles(sheet):
  """Rows and columns with pixels of a picture."""
  is_picture = (sheet == COLOUR).all(-1)
  return np.nonzero(is_picture.any(1))[0], np.nonzero(is_picture.any(0))[0]


@pytest.mark.parametrize('title', ['W' * 300, 'a ' + 'W' * 300, 'i ' * 300])
def test_a_long_title_stays_below_its_picture(title, drawn):
  sheet = drawn([title, ''])
  rows, columns = tiles(sheet)
  below = sheet[rows[-1] + 3 :]
  end = columns[len(columns) // 2 - 1]
  assert (below[:, end + 3 :] == 255).all()
  # In two lines.
  is_dark = (below < 128).any((1, 2))
  assert is_dark[:15].any()
  assert is_dark[15:].any()


@pytest.mark.parametrize(
  'heading', ['two\nlines', 'many words ' * 99, 'W' * 99]
)
def test_a_heading_stays_above_the_pictures(heading, drawn):
  sheet = drawn([''], heading)
  rows, columns = tiles(sheet)
  assert len(rows) == len(columns) == 128
  assert (sheet[rows[0] : rows[-1] + 1, columns] == COLOUR).all()
  above = sheet[: rows[0] - 1]
  assert (above < 128).any()
  # Nothing reaches the edge.
  assert (above[:, -4:] == 255).all()


def test_letters_differ(drawn):
  texts = 'É', 'К', '→', 'Ω', '\udcff'
  found = {drawn([text])[130:].tobytes() for text in texts}
  assert len(found) == len(texts)


def test_letters_that_the_first_font_lacks_are_found_in_another():
  def letters(name):
    path = font_manager.findfont(name, fallback_to_default=False)
    return ft2font.FT2Font(path).get_charmap().keys()

  one = chr(max(letters('STIXGeneral') - letters('DejaVu Sans')))
  usual = contact_sheet._font(['a']).path
  assert usual.endswith('DejaVuSans.ttf')
  assert contact_sheet._font(['a', one]).path != usual
  # That no font has.
  assert contact_sheet._font(['a', '\U0010fffe']).path == usual
