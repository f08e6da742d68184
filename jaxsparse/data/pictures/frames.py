# SPDX-License-Identifier: Apache-2.0
"""Videos of shapes, of which one shot has the answer to a question.

A video of 16 frames is one, 2, 4, 8 or 16 shots of the same length, each of
another shape that moves, in an order and in colours that are drawn anew; "the
ring is" asks for the colour of one of them. Of one shot the colour alone is to
be learned, of more also where to look.

All held-out videos have 16 shots, of a frame each: who reads the frame that the
question names is right, and who reads k of the 16 by chance is right for k / 16
of them, and for one in eight of the others.
"""

from typing import NamedTuple

import numpy as np

from jaxsparse.data.pictures import drawing
from jaxsparse.data.pictures.drawing import Thing
from jaxsparse.data.pictures.drawn import Drawn
from jaxsparse.data.pictures.pair import Pair

# Changes with the videos that a number gives.
_VERSION = 2

COLOURS = tuple(drawing.COLOURS)
SHAPES = tuple(drawing.SHAPES)
NUM_FRAMES = len(SHAPES)
NUM_SHOTS = (1, 2, 4, 8, 16)

NUMBER = 8192
# Of so many videos one is held out.
_HELD_OUT = 8


class Scene(NamedTuple):
  """What a video shows, and what is asked."""

  # Of each frame.
  things: list[Thing]
  # The first frame of the shot that the question is about.
  asked: int
  num_shots: int
  is_held_out: bool


def scene(number: int) -> Scene:
  """The video of a number."""
  rng = np.random.default_rng([_VERSION, number])
  is_held_out = number % _HELD_OUT == 0
  num_shots = NUM_FRAMES if is_held_out else int(rng.choice(NUM_SHOTS))
  length = NUM_FRAMES // num_shots
  shapes = rng.permutation(len(SHAPES))[:num_shots].repeat(length)
  colours = rng.integers(len(COLOURS), size=num_shots).repeat(length)
  places = rng.uniform(0.42, 0.58, (NUM_FRAMES, 2))
  radii = rng.uniform(0.28, 0.36, NUM_FRAMES)
  things = [
    Thing(SHAPES[shape], COLOURS[colour], x, y, radius)
    for shape, colour, (x, y), radius in zip(
      shapes, colours, places.tolist(), radii.tolist(), strict=True
    )
  ]
  asked = length * int(rng.integers(num_shots))
  return Scene(things, asked, num_shots, is_held_out)


def _pair(number: int) -> Pair:
  video = scene(number)
  thing = video.things[video.asked]
  return Pair(
    name=f'{number:06}',
    number=number,
    prompt=f'the {thing.shape} is ',
    captions=(thing.colour,),
    distractors=tuple(c for c in COLOURS if c != thing.colour),
    # Equal answers to other questions are no equal pairs.
    meaning=f'video {number}',
    group=thing.shape,
    split='validation' if video.is_held_out else 'train',
  )


def _draw(number: int, size: int) -> np.ndarray:
  """The frames, uint8 [F, S, S, 3]."""
  return np.stack([drawing.draw([t], size) for t in scene(number).things])


class Frames(Drawn):
  """Pairs of a video and what one of its shots shows."""

  # Sixteen drawings of an item take longer than a step.
  is_drawn = False

  identity = f'frames {_VERSION}'
  make_pair, draw = staticmethod(_pair), staticmethod(_draw)

  def __init__(self, number: int = NUMBER):
    super().__init__(number)
