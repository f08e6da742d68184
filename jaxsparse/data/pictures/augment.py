# SPDX-License-Identifier: Apache-2.0
"""Pictures changed at random, so that no epoch shows one as another did."""

import numpy as np

from jaxsparse.config import AugmentConfig
from jaxsparse.data.pictures import decode


def augmented(
  picture: np.ndarray, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
  """A picture as a model takes it, changed as the config allows.

  Frames of one video are cut, shifted, mirrored and lit alike; noise is of each
  value. The same generator gives the same picture.

  Args:
    picture: uint8 [S, S, 3], or frames [F, S, S, 3].
    config: how much of what may happen.
    rng: draws.

  Returns:
    float32 of the same shape, from -1, black, to 1, white.
  """
  frames = picture.reshape(-1, *picture.shape[-3:])
  if config.crop:
    frames = _cropped(frames, config.crop, rng)
  if config.shift:
    frames = _shifted(frames, config.shift, rng)
  if config.flip and rng.integers(2):
    frames = frames[:, :, ::-1]
  values = scaled(frames)
  if config.brightness:
    values += 2 * np.float32(rng.uniform(-config.brightness, config.brightness))
  if config.noise:
    drawn = rng.standard_normal(values.shape, np.float32)
    values += 2 * np.float32(config.noise) * drawn
  return np.clip(values, -1, 1).reshape(picture.shape)


def scaled(picture: np.ndarray) -> np.ndarray:
  """uint8 from 0 to 255 as float32 from -1 to 1."""
  return picture.astype(np.float32) / np.float32(127.5) - 1


def _cropped(
  frames: np.ndarray, most: float, rng: np.random.Generator
) -> np.ndarray:
  """A square part of the pictures, which fills them."""
  image_lib = decode.pillow()
  size = frames.shape[1]
  side = (1 - rng.uniform(0, most)) * size
  left, top = rng.uniform(0, size - side, 2)
  box = (left, top, left + side, top + side)
  return np.stack(
    [
      np.asarray(
        image_lib.fromarray(frame).resize(
          (size, size), image_lib.Resampling.BICUBIC, box
        )
      )
      for frame in frames
    ]
  )


def _shifted(
  frames: np.ndarray, most: float, rng: np.random.Generator
) -> np.ndarray:
  """Pictures moved by whole pixels; white comes in."""
  size = frames.shape[1]
  limit = round(most * size)
  down, right = rng.integers(-limit, limit + 1, 2)
  moved = np.full_like(frames, 255)

  def parts(by: int) -> tuple[slice, slice]:
    to, of = max(by, 0), max(-by, 0)
    length = size - abs(by)
    return slice(to, to + length), slice(of, of + length)

  rows, from_rows = parts(int(down))
  columns, from_columns = parts(int(right))
  moved[:, rows, columns] = frames[:, from_rows, from_columns]
  return moved
