# SPDX-License-Identifier: Apache-2.0
"""Pictures of two shapes, of which only the relation tells some apart.

"a red circle left of a blue square", "a blue square above a red circle": the
words alone never say what is where. The distractors of a caption have its very
words: the shapes changed over, or the colours, or both. So who knows which
words a picture has, and no more, is right for one in four.

Nothing else could be said of two shapes: in a row they are at one height, one
above the other in one column.
"""

import numpy as np

from jaxsparse.data.pictures import drawing
from jaxsparse.data.pictures.drawing import Thing
from jaxsparse.data.pictures.drawn import Drawn
from jaxsparse.data.pictures.pair import Pair

# Changes with the pictures that a number gives.
_VERSION = 2

COLOURS = tuple(drawing.COLOURS)
SHAPES = tuple(drawing.SHAPES)[:4]

# Of the one that is named first to the other.
_RELATIONS = ('left of', 'above')
# Of the two along the line on which they lie, and of both across it: either has
# a half of the picture.
ALONG = ((0.2, 0.3), (0.7, 0.8))
_ACROSS = (0.3, 0.7)
RADII = (0.14, 0.19)


def _scene(number: int) -> tuple[int, list[Thing]]:
  """The relation and the two shapes, that to the left or on top first."""
  rng = np.random.default_rng([_VERSION, number])
  relation = int(rng.integers(2))
  shapes = rng.permutation(len(SHAPES))[:2]
  colours = rng.permutation(len(COLOURS))[:2]
  radii = rng.uniform(*RADII, 2)
  first, second = (rng.uniform(*bounds) for bounds in ALONG)
  across = rng.uniform(*_ACROSS)
  things = [
    Thing(
      SHAPES[shape],
      COLOURS[colour],
      *((along, across) if relation == 0 else (across, along)),
      radius,
    )
    for shape, colour, along, radius in zip(
      shapes, colours, (first, second), radii, strict=True
    )
  ]
  return relation, things


def _pair(number: int) -> Pair:
  relation, things = _scene(number)
  return pair_of(number, relation, *things)


def pair_of(number: int, relation: int, a: Thing, b: Thing) -> Pair:
  """What is said of two shapes, and what could be with the same words.

  Args:
    number: of the picture.
    relation: 0 if `a` is left of `b`, 1 if it is above.
    a: that to the left, or on top.
    b: the other.
  """
  word = _RELATIONS[relation]
  recoloured = (a._replace(colour=b.colour), b._replace(colour=a.colour))
  said = [
    f'{one.name} {word} {other.name}'
    for one, other in ((a, b), (b, a), recoloured, recoloured[::-1])
  ]
  return Pair(
    name=f'{number:06}',
    number=number,
    captions=(said[0],),
    distractors=tuple(said[1:]),
    group=word,
  )


def _draw(number: int, size: int) -> np.ndarray:
  return drawing.draw(_scene(number)[1], size)


class Shapes(Drawn):
  """Pairs of two shapes and what is where."""

  identity = f'shapes {_VERSION}'
  make_pair, draw = staticmethod(_pair), staticmethod(_draw)
