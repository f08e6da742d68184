# SPDX-License-Identifier: Apache-2.0
"""One figure over several seeds, and tables of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spread:
  """One figure over seeds."""

  values: tuple[float, ...]

  @property
  def mean(self) -> float:
    return float(np.mean(self.values))

  @property
  def low(self) -> float:
    return min(self.values)

  @property
  def high(self) -> float:
    return max(self.values)

  @property
  def std(self) -> float:
    """Of a sample, and 0 of a single value."""
    return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

  def text(self, form: str) -> str:
    """Mean, least to greatest, and standard deviation, each in `form`."""
    if len(self.values) < 2:
      return format(self.mean, form)
    low, high = (format(x, form) for x in (self.low, self.high))
    std = format(self.std, form.lstrip('+'))
    return f'{self.mean:{form}} ({low} to {high}; ± {std})'


def text_of(figure: Spread | None, form: str) -> str:
  return '-' if figure is None else figure.text(form)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
