# SPDX-License-Identifier: Apache-2.0
"""Pictures of four shapes, of which a caption names two.

One is in each quarter, and a caption is about a row or a column: "a red circle
left of a blue square". Which two it names is not seen in the picture, so one
vector has to keep what could be said of any; who reads the picture with the
text at hand need only look there. Distractors are as those of two shapes.
"""

import numpy as np

from jaxsparse.data.pictures import drawing, shapes
from jaxsparse.data.pictures.drawing import Thing
from jaxsparse.data.pictures.drawn import Drawn
from jaxsparse.data.pictures.pair import Pair

# Changes with the pictures that a number gives.
_VERSION = 3

# Of the two that are named in a row and in a column: the first, by which row or
# column it is, and steps from it to the other.
_FIRST, _STEP = ((0, 2), (0, 1)), (1, 2)


def _scene(number: int) -> tuple[int, list[Thing], tuple[Thing, Thing]]:
  """The relation, all shapes row by row, and the two that are named."""
  rng = np.random.default_rng([_VERSION, number])
  kinds = rng.permutation(len(shapes.SHAPES))
  colours = rng.permutation(len(shapes.COLOURS))
  things = [
    Thing(
      shapes.SHAPES[kinds[i]],
      shapes.COLOURS[colours[i]],
      rng.uniform(*shapes.ALONG[i % 2]),
      rng.uniform(*shapes.ALONG[i // 2]),
      rng.uniform(*shapes.RADII),
    )
    for i in range(4)
  ]
  relation, line = rng.integers(2, size=2).tolist()
  first = _FIRST[relation][line]
  return relation, things, (things[first], things[first + _STEP[relation]])


def _pair(number: int) -> Pair:
  relation, _, named = _scene(number)
  return shapes.pair_of(number, relation, *named)


def _draw(number: int, size: int) -> np.ndarray:
  return drawing.draw(_scene(number)[1], size)


class FourShapes(Drawn):
  """Pairs of four shapes and what is where of two."""

  identity = f'four shapes {_VERSION}'
  make_pair, draw = staticmethod(_pair), staticmethod(_draw)
