# SPDX-License-Identifier: Apache-2.0
"""Emoji of a tiny font that the test makes, with lists as Unicode has them."""

import json
import pathlib

import numpy as np
import pairs
import pytest
from fontTools import fontBuilder, ttLib
from fontTools.feaLib import builder
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics

from jaxsparse.cli import convert
from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pictures import decode

NAMES = """# emoji-test.txt
# group: Smileys & Emotion
# subgroup: face-smiling
1F600          ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F      ; fully-qualified     # ☺️ E0.6 smiling face
263A           ; unqualified         # ☺ E0.6 smiling face
# group: People & Body
# subgroup: person-role
1F468 200D 2696 FE0F ; fully-qualified # 👨‍⚖️ E4.0 man judge
1F468 200D 2696      ; minimally-qualified # 👨‍⚖ E4.0 man judge
# group: Symbols
# subgroup: keycap
0023 FE0F 20E3 ; fully-qualified     # #️⃣ E0.6 keycap: #
1F9FF          ; fully-qualified     # 🧿 E11.0 nazar amulet
1F6D2          ; component           # 🛒 E3.0 shopping cart
"""
EN = """<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE ldml SYSTEM "../../common/dtd/ldml.dtd">
<ldml><annotations>
  <annotation cp="😀">face | grin</annotation>
  <annotation cp="😀" type="tts">grinning face</annotation>
  <annotation cp="☺">same</annotation>
  <annotation cp="👨‍⚖">same</annotation>
  <annotation cp="👨‍⚖" type="tts">male judge</annotation>
  <annotation cp="#️⃣">↑↑↑</annotation>
</annotations></ldml>"""

GLYPHS = {'grin': 0x1F600, 'smile': 0x263A, 'man': 0x1F468, 'zwj': 0x200D}
GLYPHS |= {'scales': 0x2696, 'number': 0x23, 'keycap': 0x20E3}
# With a picture each, in this order.
DRAWN = ('grin', 'smile', 'judge', 'hash')
FEATURES = """feature ccmp {
  sub man zwj scales by judge;
  sub number keycap by hash;
} ccmp;"""


def write_font(path: pathlib.Path, has_bitmaps: bool = True) -> pathlib.Path:
  order = ['.notdef', *DRAWN, *(g for g in GLYPHS if g not in DRAWN)]
  made = fontBuilder.FontBuilder(1024)
  made.setupGlyphOrder(order)
  made.setupCharacterMap({point: name for name, point in GLYPHS.items()})
  made.setupHorizontalMetrics(dict.fromkeys(order, (1024, 0)))
  made.setupHorizontalHeader()
  made.setupOS2()
  made.setupPost()
  builder.addOpenTypeFeaturesFromString(made.font, FEATURES)
  if has_bitmaps:
    _add_bitmaps(made.font)
  made.save(path)
  return path


def _add_bitmaps(font: ttLib.TTFont) -> None:
  bitmaps = {}
  for i, name in enumerate(DRAWN):
    bitmap = C_B_D_T_.cbdt_bitmap_format_17(b'', font)
    bitmap.metrics = metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
    metrics.height, metrics.width, metrics.Advance = 4, 6, 6
    metrics.BearingX = metrics.BearingY = 0
    bitmap.imageData = pairs.png(i)
    bitmaps[name] = bitmap
  data = ttLib.newTable('CBDT')
  data.version, data.strikeData = 3.0, [bitmaps]
  places = ttLib.newTable('CBLC')
  places.version = 3.0
  strike = E_B_L_C_.Strike()
  size = strike.bitmapSizeTable
  size.hori, size.vert = E_B_L_C_.SbitLineMetrics(), E_B_L_C_.SbitLineMetrics()
  for line in (size.hori, size.vert):
    for name in (
      'ascender', 'descender', 'widthMax', 'caretSlopeNumerator',
      'caretSlopeDenominator', 'caretOffset', 'minOriginSB', 'minAdvanceSB',
      'maxBeforeBL', 'minAfterBL', 'pad1', 'pad2',
    ):  # fmt: skip
      setattr(line, name, 0)
  size.colorRef, size.flags = 0, 1
  size.ppemX = size.ppemY = 4
  size.bitDepth = 32
  index = E_B_L_C_.eblc_index_sub_table_1(b'', font)
  index.indexFormat, index.imageFormat = 1, 17
  index.imageSize = None
  index.names = list(DRAWN)
  strike.indexSubTables = [index]
  size.startGlyphIndex, size.endGlyphIndex = 1, len(DRAWN)
  places.strikes = [strike]
  font['CBLC'], font['CBDT'] = places, data


@pytest.fixture
def files(tmp_path):
  write_font(tmp_path / 'font.ttf')
  (tmp_path / 'names.txt').write_text(NAMES)
  (tmp_path / 'en.xml').write_text(EN)
  return tmp_path


def _convert(files, *more, **paths):
  paths = dict(font='font.ttf', names='names.txt', annotations='en.xml') | paths
  flags = [f'--{name}={files / path}' for name, path in paths.items()]
  convert.main(['emoji', *flags, f'--out={files / "out"}', *more])


def test_a_font_becomes_a_folder_of_pairs(files, capsys):
  _convert(files)
  out = capsys.readouterr().out
  assert '4 pairs of 5 emoji, 2 with further captions.' in out
  assert "The font lacks 1, such as 'nazar amulet'." in out
  lines = (files / 'out' / 'captions.jsonl').read_text().splitlines()
  assert [json.loads(line)['captions'] for line in lines] == [
    # Its own name again is no further caption, nor what others are called too.
    ['grinning face', 'face grin'],
    ['smiling face'],
    ['man judge', 'male judge'],
    ['keycap: #'],
  ]
  judge = json.loads(lines[2])
  assert (judge['group'], judge['category']) == ('person-role', 'People & Body')
  assert judge['image'] == '1f468-200d-2696-fe0f.png'
  assert judge['emoji'] == '👨‍⚖️'
  config = DataConfig(
    pairs=str(files / 'out'),
    cache_dir=str(files / 'cache'),
    validation_fraction=0.25,
  )
  corpus = build_corpus(config, lambda _: None)
  for pair in (*corpus.train, *corpus.validation):
    np.testing.assert_array_equal(
      corpus.pictures.picture(pair.number, 8),
      decode.read_picture(pairs.png(pair.number), 8),
    )
  assert {path.name for path in files.iterdir()} == {
    'font.ttf', 'names.txt', 'en.xml', 'out', 'cache',
  }  # fmt: skip


def test_what_is_there_is_not_written_over(files):
  (files / 'out').mkdir()
  (files / 'out' / 'mine').write_text('')
  with pytest.raises(UserError, match='must be new or an empty folder'):
    _convert(files)


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('font.ttf', None, "font.ttf' cannot be read"),
    ('font.ttf', b'no font', "font.ttf' is no sound font"),
    ('names.txt', None, "names.txt' cannot be read"),
    ('names.txt', b'# group: x', 'no line of a fully-qualified emoji: give Un'),
    ('names.txt', b'\xff', "names.txt' is not UTF-8"),
    ('en.xml', b'<ldml>', "en.xml' is no XML"),
    ('en.xml', b'<ldml></ldml>', "en.xml' has no annotation"),
    (
      'names.txt',
      b'1F9FF ; fully-qualified # \xf0\x9f\xa7\xbf E11.0 nazar amulet',
      'a picture of none of the emoji',
    ),
  ],
)
def test_wrong_files_are_named(files, name, content, words):
  path = files / name
  path.unlink() if content is None else path.write_bytes(content)
  with pytest.raises(UserError, match=words) as error:
    _convert(files)
  assert '\n' not in str(error.value)
  assert not (files / 'out').exists()


def test_a_font_of_outlines_is_refused(files):
  write_font(files / 'font.ttf', has_bitmaps=False)
  with pytest.raises(UserError, match=r'has no bitmaps \(no table CBDT\)'):
    _convert(files)


def test_help_names_the_packages(capsys):
  with pytest.raises(SystemExit):
    convert.main(['emoji', '--help'])
  out = capsys.readouterr().out
  for package in ('fonts-noto-color-emoji', 'unicode-data', 'unicode-cldr-co'):
    assert package in out
