# SPDX-License-Identifier: Apache-2.0
"""Held-out pairs as chance and linear maps find them, as a run's end has it."""

import dataclasses
import functools

import pytest

from jaxsparse.data.pictures.frames import Frames
from jaxsparse.data.pictures.shapes import Shapes
from jaxsparse.data.pieces import Corpus
from jaxsparse.training import pair_baselines


def _lines(made, number, size=8):
  pairs = [
    dataclasses.replace(pair, item=i) for i, pair in enumerate(made.pairs)
  ]
  corpus = Corpus(
    key='', directory=None, train=pairs[number:], validation=pairs[:number],
    test=None, validation_bytes=0, pictures=made,
  )  # fmt: skip
  read = functools.partial(made.picture, size=size)
  return list(pair_baselines.lines(corpus, read))


def test_chance_is_told_beside_linear_maps(monkeypatch):
  """Of training pairs no more are read than may be."""
  monkeypatch.setattr(pair_baselines, 'MOST', 50)
  read = set()
  draw = Shapes.draw
  monkeypatch.setattr(
    Shapes, 'draw', lambda number, size: read.add(number) or draw(number, size)
  )
  chance, colour, pixels = _lines(Shapes(120), 20)
  assert chance == (
    'Chance: picture -> caption R@1 5.0% R@10 50.0%, '
    'caption -> picture R@1 5.0% R@10 50.0%'
  )
  assert colour.startswith('By mean colour: picture -> caption R@1 ')
  assert pixels.startswith('By pixels, linear: picture -> caption R@1 ')
  assert read == {*range(20), *range(20, 120, 2)}


@pytest.mark.parametrize(('made', 'number'), [(Frames(9), 3), (Shapes(9), 7)])
def test_nothing_is_told_of_videos_and_of_many_pairs(made, number, monkeypatch):
  monkeypatch.setattr(pair_baselines, 'MOST', 5)
  assert not _lines(made, number)
