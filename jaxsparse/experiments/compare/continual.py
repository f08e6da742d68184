# SPDX-License-Identifier: Apache-2.0
"""What a comparison of ways to learn new facts beside old ones is.

A base learns the facts of some people. From it each method learns those of
other people, whose names are made of the same parts, at each of its rates. How
many of the new facts it has then, and how many of the old ones, is the result.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """One way to learn the new facts."""

  # Peak learning rates, one run for each.
  rates: tuple[float, ...]
  # What is trained; by default all parameters.
  adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
  # Share of the old text in each batch. The run is as much longer.
  replay_share: float = 0.0

  def __post_init__(self):
    require(
      len(set(self.rates)) == len(self.rates) > 0 and min(self.rates) > 0,
      f'rates must be positive and differ from each other, got {self.rates}.',
    )
    require(
      0 <= self.replay_share < 1,
      f'replay_share must be at least 0 and below 1, got {self.replay_share}.',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continual:
  """What follows on the runs of a suite, of one architecture on facts."""

  # New people, beside those that the base knows.
  people: int
  # Training lasts until a fact (of a person who is not famous) was seen so
  # often.
  exposures: int
  # By the names that tables and plots show; each begins a folder's name, too.
  methods: Mapping[str, Method]
  # Fields of the `OptimizerConfig` that are not those of the base's run.
  optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for field in ('people', 'exposures'):
      value = getattr(self, field)
      require(value > 0, f'{field} must be positive, got {value}.')
    require(bool(self.methods), 'continual needs a method.')
    for name in self.methods:
      require(
        name.replace('_', '').isalnum(),
        f'a method is named by letters, digits and _; got {name!r}.',
      )
