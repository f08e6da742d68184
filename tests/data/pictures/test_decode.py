# SPDX-License-Identifier: Apache-2.0
"""Pictures of every kind: right, or one sentence that names the file."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from jaxsparse.config.errors import UserError
from jaxsparse.data.pictures import decode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255,) * 3
S = 8


def stored(picture, kind='PNG', **more) -> bytes:
  file = io.BytesIO()
  picture.save(file, kind, **more)
  return file.getvalue()


def halves(mode='RGB', size=(16, 16), left=RED, right=BLUE):
  picture = Image.new(mode, size, left)
  picture.paste(right, (size[0] // 2, 0, *size))
  return picture


def close(pixel, wanted, by=3) -> bool:
  return bool((np.abs(pixel.astype(int) - wanted) <= by).all())


def check_halves(pixels, left=RED, right=BLUE, by=3):
  assert pixels.shape == (S, S, 3)
  assert pixels.dtype == np.uint8
  assert close(pixels[:, : S // 2 - 1], left, by), pixels[0]
  assert close(pixels[:, S // 2 + 1 :], right, by), pixels[0]


@pytest.mark.parametrize(
  ('kind', 'more', 'by'),
  [
    ('PNG', {}, 0),
    ('BMP', {}, 0),
    ('TIFF', {}, 0),
    ('WEBP', dict(lossless=True), 0),
    ('JPEG', dict(quality=95, subsampling=0), 4),
    ('GIF', {}, 0),
  ],
)
def test_formats(kind, more, by):
  check_halves(decode.read_picture(stored(halves(), kind, **more), S), by=by)


def test_a_path_is_read(tmp_path):
  halves().save(tmp_path / 'a.png')
  for path in (tmp_path / 'a.png', str(tmp_path / 'a.png')):
    check_halves(decode.read_picture(path, S))


def test_palette_and_grey():
  palette = halves().quantize(4)
  assert palette.mode == 'P'
  check_halves(decode.read_picture(stored(palette), S))
  grey = halves('L', left=51, right=204)
  check_halves(decode.read_picture(stored(grey), S), (51,) * 3, (204,) * 3)
  bits = halves('1', left=0, right=1)
  check_halves(decode.read_picture(stored(bits), S), (0,) * 3, WHITE)


def test_cmyk():
  """As a printer's JPEG has it; JPEG stores its inks, not their inverse."""
  picture = halves('CMYK', left=(0, 255, 255, 0), right=(255, 255, 0, 0))
  for kind in ('TIFF', 'JPEG'):
    check_halves(decode.read_picture(stored(picture, kind), S), by=12)


def test_sixteen_bits():
  """As grey levels, of which Pillow itself would make white."""
  levels = np.full((16, 16), 256 * 64 + 64, np.uint16)
  levels[:, 8:] = 65535
  pixels = decode.read_picture(stored(Image.fromarray(levels)), S)
  check_halves(pixels, (64,) * 3, WHITE)


def png(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
  """A PNG chunk by chunk, for kinds that Pillow does not write."""

  def chunk(name, content):
    crc = struct.pack('>I', zlib.crc32(name + content))
    return struct.pack('>I', len(content)) + name + content + crc

  return b'\x89PNG\r\n\x1a\n' + b''.join(
    chunk(*c)
    for c in (
      (b'IHDR', header),
      *chunks,
      (b'IDAT', zlib.compress(rows)),
      (b'IEND', b''),
    )
  )


def test_sixteen_bits_of_each_colour():
  row = (
    struct.pack('>3H', 65535, 0, 0) * 8 + struct.pack('>3H', 0, 0, 65535) * 8
  )
  content = png(
    struct.pack('>2I5B', 16, 16, 16, 2, 0, 0, 0), (b'\0' + row) * 16
  )
  check_halves(decode.read_picture(content, S))


def test_sixteen_bits_of_which_one_level_is_transparent():
  row = struct.pack('>H', 0) * 8 + struct.pack('>H', 257 * 100) * 8
  content = png(
    struct.pack('>2I5B', 16, 16, 16, 0, 0, 0, 0),
    (b'\0' + row) * 16,
    (b'tRNS', struct.pack('>H', 0)),
  )
  pixels = decode.read_picture(content, S)
  check_halves(pixels, WHITE, (100,) * 3)


def test_transparent_parts_are_white_whatever_lies_below():
  clear = halves('RGBA', left=(255, 0, 0, 0), right=(0, 0, 255, 255))
  check_halves(decode.read_picture(stored(clear), S), WHITE)
  half = halves('RGBA', left=(0, 0, 0, 128), right=(0, 0, 255, 255))
  check_halves(decode.read_picture(stored(half), S), (127,) * 3)
  grey = halves('LA', left=(0, 0), right=(51, 255))
  check_halves(decode.read_picture(stored(grey), S), WHITE, (51,) * 3)
  palette = halves().quantize(4)
  red = palette.getpixel((0, 0))
  check_halves(decode.read_picture(stored(palette, transparency=red), S), WHITE)
  colour = stored(halves(), transparency=RED)
  check_halves(decode.read_picture(colour, S), WHITE)


@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG'])
def test_of_an_animation_the_first_picture_counts(kind):
  later = [halves(left=GREEN, right=GREEN), halves(left=BLUE, right=RED)]
  more = dict(lossless=True) if kind == 'WEBP' else {}
  content = stored(
    halves(), kind, save_all=True, append_images=later, duration=50, **more
  )
  check_halves(decode.read_picture(content, S))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_camera_held_on_its_side(orientation):
  """Stored as the camera saw it, shown as it was."""
  back = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
  }
  picture = halves()
  for turn in back[orientation]:
    picture = picture.transpose(turn)
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = stored(picture, 'JPEG', exif=exif, quality=95, subsampling=0)
  check_halves(decode.read_picture(content, S), by=4)


def test_broken_notes_of_a_camera_do_no_harm():
  content = stored(halves(), exif=b'Exif\0\0MM\0*\xff\xff\xff\xff')
  check_halves(decode.read_picture(content, S))


def test_profiles_are_no_obstacle():
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB'))
  content = stored(halves(), icc_profile=profile.tobytes())
  check_halves(decode.read_picture(content, S))


def test_one_pixel_fills_the_square():
  pixels = decode.read_picture(stored(Image.new('RGB', (1, 1), GREEN)), S)
  assert (pixels == GREEN).all()


@pytest.mark.parametrize('size', [(20_000, 1), (1, 20_000), (40, 10)])
def test_long_pictures_lie_in_the_middle_undistorted(size):
  pixels = decode.read_picture(stored(Image.new('RGB', size, RED)), S)
  if size[1] > size[0]:
    pixels = pixels.transpose(1, 0, 2)
  is_red = (pixels == RED).all(-1)
  thickness = max(1, round(S * min(size) / max(size)))
  begin = (S - thickness) // 2
  assert is_red[begin : begin + thickness].all()
  assert is_red.sum() == S * thickness
  assert (pixels[~is_red] == WHITE).all()


def test_detail_is_averaged_and_not_skipped():
  """Stripes a pixel wide become grey, not black or white."""
  stripes = np.zeros((64, 64), np.uint8)
  stripes[:, ::2] = 255
  pixels = decode.read_picture(stored(Image.fromarray(stripes)), S)
  assert close(pixels[2:-2, 2:-2], (127,) * 3, 12)


def no_bytes():
  return b''


def text():
  return b'no picture at all'


def truncated():
  noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
  return stored(Image.fromarray(noise))[:6000]


def truncated_jpeg():
  return stored(Image.new('RGB', (640, 640), RED), 'JPEG')[:800]


def header_alone():
  return stored(halves())[:30]


def wrong_checksum():
  content = bytearray(stored(halves()))
  content[60] ^= 255
  return bytes(content)


def bomb():
  """Some kilobytes that claim to be 400 million pixels."""
  return png(struct.pack('>2I5B', 20_000, 20_000, 8, 2, 0, 0, 0), b'\0' * 99)


def larger_bomb():
  return png(struct.pack('>2I5B', 2**31 - 1, 2**30, 8, 2, 0, 0, 0), b'\0' * 99)


def just_too_large():
  return png(struct.pack('>2I5B', 8193, 8192, 8, 2, 0, 0, 0), b'\0' * 99)


def fractions():
  return stored(Image.fromarray(np.ones((4, 4), np.float32)), 'TIFF')


def large_levels():
  return stored(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), 'TIFF')


def postscript():
  """Another program would be started to read it."""
  return stored(halves(), 'EPS')


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (no_bytes, 'is empty: give a picture as PNG'),
    (text, 'no picture of a known format'),
    (postscript, 'no picture of a known format'),
    (truncated, r'is broken \(.*truncated.*\): repair it'),
    (truncated_jpeg, r'is broken \(.*truncated.*\): repair it'),
    (header_alone, 'broken'),
    (wrong_checksum, 'broken'),
    (bomb, r'too large .far more pixels.: give one of at most'),
    (larger_bomb, 'too large'),
    (just_too_large, r'too large \(8,193 x 8,192 pixels\)'),
    (fractions, r'is broken \(grey levels as fractions'),
    (large_levels, r'is broken \(grey levels beyond 16 bits'),
  ],
)
def test_what_cant_be_read_is_said_in_a_sentence(tmp_path, make, words):
  path = tmp_path / 'bad.png'
  path.write_bytes(make())
  for args in ((path, S), (make(), S, 'picture 2 of message 3')):
    with pytest.raises(UserError, match=words) as error:
      decode.read_picture(*args)
    sentence = str(error.value)
    assert repr(args[2] if len(args) > 2 else str(path)) in sentence
    assert '\n' not in sentence
    assert sentence.endswith('.')


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"gone.png' cannot be read \(No such"):
    decode.read_picture(tmp_path / 'gone.png', S)
  with pytest.raises(UserError, match='cannot be read'):
    decode.read_picture(tmp_path, S)
  with pytest.raises(UserError, match='cannot be read'):
    decode.read_picture('a\0.png', S)


def test_a_bomb_is_not_decoded(monkeypatch):
  """Nothing is unpacked: the header tells."""
  monkeypatch.setattr(Image.Image, 'load', None)
  with pytest.raises(UserError, match='too large'):
    decode.read_picture(bomb(), S)


def test_without_pillow_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'PIL', None)
  with pytest.raises(UserError, match=r"pip install 'jaxsparse\[train\]'"):
    decode.read_picture(b'any', S)
