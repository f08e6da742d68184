# SPDX-License-Identifier: Apache-2.0
"""A collection of pairs that are drawn; the same number gives the same one."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from jaxsparse.data.pictures.pair import Pair

NUMBER = 4096


class Drawn:
  """`number` pairs, whose pictures are drawn.

  Attributes:
    is_drawn: whether again whenever they are read; else they are kept.
    identity: name of the collection, which changes with its pictures.
    make_pair: the pair of a number.
    draw: the picture of a number and a side, uint8 [S, S, 3] or [F, S, S, 3].
  """

  is_drawn = True

  identity: str
  make_pair: Callable[[int], Pair]
  draw: Callable[[int, int], np.ndarray]

  def __init__(self, number: int = NUMBER):
    self._number = number

  @functools.cached_property
  def pairs(self) -> Sequence[Pair]:
    return [type(self).make_pair(number) for number in range(self._number)]

  def digest(self, number: int) -> str:
    return f'{self.identity} {number}'

  def picture(self, number: int, size: int) -> np.ndarray:
    return type(self).draw(number, size)
