# SPDX-License-Identifier: Apache-2.0
"""Draws simple shapes on a white ground."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

COLOURS = dict(
  red=(220, 30, 30),
  green=(30, 160, 40),
  blue=(40, 70, 220),
  yellow=(240, 200, 20),
  purple=(140, 40, 170),
  orange=(245, 130, 20),
  brown=(120, 70, 30),
  black=(10, 10, 10),
)

# Points of a pixel along each side, of which the mean is taken.
_POINTS = 3

# Whether points belong to a shape, from -1 to 1 to the right and downwards.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = dict(
  circle=lambda x, y: x**2 + y**2 <= 1,
  square=lambda x, y: np.maximum(abs(x), abs(y)) <= 0.88,
  triangle=lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 0.9),
  cross=lambda x, y: np.minimum(abs(x), abs(y)) <= 0.3,
  diamond=lambda x, y: abs(x) + abs(y) <= 1,
  ring=lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
  frame=lambda x, y: np.maximum(abs(x), abs(y)) >= 0.55,
  bar=lambda x, y: abs(y) <= 0.3,
  pillar=lambda x, y: abs(x) <= 0.3,
  wedge=lambda x, y: (abs(x) <= (1 - y) / 2) & (y >= -0.9),
  arch=lambda x, y: (x**2 + (y - 0.5) ** 2 <= 1) & (y <= 0.5),
  bowl=lambda x, y: (x**2 + (y + 0.5) ** 2 <= 1) & (y >= -0.5),
  corner=lambda x, y: (x <= -0.4) | (y >= 0.4),
  slash=lambda x, y: abs(x + y) <= 0.4,
  stripes=lambda x, y: abs(abs(y) - 0.7) <= 0.25,
  dots=lambda x, y: (abs(x) - 0.6) ** 2 + (abs(y) - 0.6) ** 2 <= 0.14,
)


class Thing(NamedTuple):
  """A shape; lengths are shares of the picture's side."""

  shape: str
  colour: str
  # Of its middle, to the right and downwards.
  x: float
  y: float
  # Half of its side.
  radius: float

  @property
  def name(self) -> str:
    article = 'an' if self.colour[0] in 'aeiou' else 'a'
    return f'{article} {self.colour} {self.shape}'


def draw(things: Sequence[Thing], size: int) -> np.ndarray:
  """The things on white, the last above the others, uint8 [S, S, 3]."""
  picture = np.full((size, size, 3), 255.0)
  for thing in things:
    columns, x = _points(thing.x, thing.radius, size)
    rows, y = _points(thing.y, thing.radius, size)
    is_within = (abs(x)[None] <= 1) & (abs(y)[:, None] <= 1)
    points = is_within & SHAPES[thing.shape](x[None], y[:, None])
    height, width = rows.stop - rows.start, columns.stop - columns.start
    share = points.reshape(height, _POINTS, width, _POINTS).mean((1, 3))
    part = picture[rows, columns]
    part += share[..., None] * (np.array(COLOURS[thing.colour]) - part)
  return np.rint(picture).astype(np.uint8)


def _points(
  middle: float, radius: float, size: int
) -> tuple[slice, np.ndarray]:
  """Pixels that a shape may touch, and the places of their points in it."""
  start = max(math.floor((middle - radius) * size), 0)
  stop = min(math.ceil((middle + radius) * size), size)
  points = np.arange(_POINTS * start, _POINTS * stop) + 0.5
  return slice(start, stop), (points / (_POINTS * size) - middle) / radius
