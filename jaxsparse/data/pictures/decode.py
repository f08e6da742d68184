# SPDX-License-Identifier: Apache-2.0
"""A picture of any common kind as numbers, or one sentence why not.

What a file says of itself is read before it is decoded: a few kilobytes may
claim to be gigabytes of pixels. Formats whose reading runs other programs, as
that of PostScript does, are not opened at all.
"""

import contextlib
import io
import math
import pathlib
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxsparse.config.errors import UserError

# Of a picture as it is stored; four bytes each while it is read.
MOST_PIXELS = 2**26

_FORMATS = ('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF')
_KNOWN = 'PNG, JPEG, GIF, WebP, BMP or TIFF'
# Modes that hold 16 bits a pixel.
_DEEP = ('I;16', 'I;16L', 'I;16B', 'I;16N')


def read_picture(
  source: bytes | pathlib.PurePath | str,
  size: int,
  name: str = '',
  most_pixels: int = MOST_PIXELS,
) -> np.ndarray:
  """A picture in a white square of `size` pixels, uint8 [S, S, 3].

  The whole picture is there, undistorted and in the middle: what is not square
  has white beside it. Transparent parts are white, of an animation the first
  picture counts, and one that a camera held on its side is turned upright.

  Args:
    source: the file's bytes, or its path.
    size: of the square's side S.
    name: what errors call it; by default the path.
    most_pixels: of a picture as it is stored.

  Raises:
    UserError: it can't be read, is broken, too large or of no known format.
  """
  image_lib = pillow()
  is_path = not isinstance(source, bytes)
  name = name or (str(source) if is_path else 'the picture')
  with opened(source, name, most_pixels) as picture, _sentences(name):
    # A JPEG can be decoded at a fraction of its size at once.
    picture.draft('RGB', (2 * size, 2 * size))
    picture.load()
    picture = _upright(picture)
    scale = size / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    small = _on_white(picture).resize(
      (width, height), image_lib.Resampling.BICUBIC
    )
    square = image_lib.new('RGB', (size, size), 'white')
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def pillow() -> types.ModuleType:
  """Pillow's module `Image`.

  Raises:
    UserError: it is not installed.
  """
  try:
    from PIL import Image
  except ImportError as error:
    raise UserError(
      "reading pictures needs Pillow: pip install 'jaxsparse[train]'."
    ) from error
  return Image


@contextlib.contextmanager
def opened(
  source: bytes | pathlib.PurePath | str,
  name: str,
  most_pixels: int = MOST_PIXELS,
) -> Iterator[Any]:
  """Pillow's view of a file, of which the header alone has been read.

  Raises:
    UserError: it can't be read, is of no known format, or says that it has more
      than `most_pixels`.
  """
  image_lib = pillow()
  if not isinstance(source, bytes):
    try:
      path = pathlib.Path(source) if isinstance(source, str) else source
      source = path.read_bytes()
    except (OSError, ValueError) as error:
      reason = getattr(error, 'strerror', None) or error
      raise UserError(
        f'{name!r} cannot be read ({reason}): name a picture that is there.'
      ) from error
  if not source:
    raise UserError(f'{name!r} is empty: give a picture as {_KNOWN}.')
  with contextlib.ExitStack() as stack:
    with warnings.catch_warnings(), _sentences(name):
      # Of sizes, below, and of odd but readable files.
      warnings.simplefilter('ignore')
      try:
        picture = image_lib.open(io.BytesIO(source), formats=_FORMATS)
      except image_lib.DecompressionBombError as error:
        raise _too_large(name, most_pixels) from error
      except image_lib.UnidentifiedImageError as error:
        raise UserError(
          f'{name!r} is no picture of a known format, or its beginning is '
          f'broken: give {_KNOWN}.'
        ) from error
    stack.enter_context(picture)
    if picture.width * picture.height > most_pixels:
      raise _too_large(name, most_pixels, picture.size)
    if not picture.width * picture.height:
      raise UserError(
        f'{name!r} has no pixels ({picture.width} x {picture.height}): give '
        'another picture.'
      )
    yield picture


def _too_large(
  name: str, most_pixels: int, size: tuple[int, int] | None = None
) -> UserError:
  which = f'{size[0]:,} x {size[1]:,}' if size else 'far more'
  side = math.isqrt(most_pixels)
  return UserError(
    f'{name!r} is too large ({which} pixels): give one of at most '
    f'{most_pixels:,} pixels in all, such as {side:,} x {side:,}.'
  )


@contextlib.contextmanager
def _sentences(name: str) -> Iterator[None]:
  """Says of whatever a decoder raises that the file is broken."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  except UserError:
    raise
  except Exception as error:
    # They raise what they come upon: OSError, SyntaxError, struct.error ...
    reason = (str(error).splitlines() or [''])[0] or type(error).__name__
    raise UserError(
      f'{name!r} is broken ({reason}): repair it, or leave it out.'
    ) from error


def _upright(picture: Any) -> Any:
  from PIL import ImageOps

  try:
    return ImageOps.exif_transpose(picture)
  except Exception:
    # What a camera says may be broken where the picture is not.
    return picture


def _on_white(picture: Any) -> Any:
  """The picture in 8 bits, red, green and blue, on a white ground."""
  image_lib = pillow()
  if picture.mode in _DEEP or picture.mode == 'I':
    return image_lib.fromarray(_in_8_bits(picture)).convert('RGB')
  if picture.mode == 'F':
    raise ValueError('grey levels as fractions, whose range nothing tells')
  if not picture.has_transparency_data:
    return picture.convert('RGB')
  picture = picture.convert('RGBA')
  ground = image_lib.new('RGBA', picture.size, 'white')
  return image_lib.alpha_composite(ground, picture).convert('RGB')


def _in_8_bits(picture: Any) -> np.ndarray:
  """Grey levels of 16 bits, which Pillow would cut off at 255."""
  levels = np.asarray(picture).astype(np.int64)
  if levels.min() < 0 or levels.max() > 65535:
    raise ValueError('grey levels beyond 16 bits, whose range nothing tells')
  grey = ((levels + 128) // 257).astype(np.uint8)
  # One level may stand for what is transparent.
  hidden = picture.info.get('transparency', -1)
  return np.where(levels == hidden, np.uint8(255), grey)
