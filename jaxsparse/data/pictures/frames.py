# SPDX-License-Identifier: Apache-2.0
"""Videos of shapes, of which one frame has the answer to a question.

Each of the 16 frames shows another shape, in an order and in colours that are
drawn anew; "the ring is" asks for the colour of one of them. So who reads the
frame that the question names is right, and who reads k of the 16 by chance is
right for k / 16 of them, and for one in eight of the others.
"""

import numpy as np

from jaxsparse.data.pictures import drawing
from jaxsparse.data.pictures.drawing import Thing
from jaxsparse.data.pictures.drawn import Drawn
from jaxsparse.data.pictures.pair import Pair

# Changes with the videos that a number gives.
_VERSION = 1

COLOURS = tuple(drawing.COLOURS)
SHAPES = tuple(drawing.SHAPES)
NUM_FRAMES = len(SHAPES)


def asked(number: int) -> int:
  """The frame that the question of a video is about."""
  return _scene(number)[1]


def _scene(number: int) -> tuple[list[Thing], int]:
  rng = np.random.default_rng([_VERSION, number])
  order = rng.permutation(NUM_FRAMES)
  colours = rng.integers(len(COLOURS), size=NUM_FRAMES)
  places = rng.uniform(0.42, 0.58, (NUM_FRAMES, 2))
  radii = rng.uniform(0.28, 0.36, NUM_FRAMES)
  things = [
    Thing(SHAPES[shape], COLOURS[colour], *place, radius)
    for shape, colour, place, radius in zip(
      order, colours, places.tolist(), radii.tolist(), strict=True
    )
  ]
  return things, int(rng.integers(NUM_FRAMES))


def _pair(number: int) -> Pair:
  things, frame = _scene(number)
  thing = things[frame]
  return Pair(
    name=f'{number:06}',
    number=number,
    prompt=f'the {thing.shape} is ',
    captions=(thing.colour,),
    distractors=tuple(c for c in COLOURS if c != thing.colour),
    # Equal answers to other questions are no equal pairs.
    meaning=f'video {number}',
    group=thing.shape,
  )


def _draw(number: int, size: int) -> np.ndarray:
  """The frames, uint8 [F, S, S, 3]."""
  things, _ = _scene(number)
  return np.stack([drawing.draw([thing], size) for thing in things])


class Frames(Drawn):
  """Pairs of a video and what one of its frames shows."""

  identity = f'frames {_VERSION}'
  make_pair, draw = staticmethod(_pair), staticmethod(_draw)
