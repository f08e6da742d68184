# SPDX-License-Identifier: Apache-2.0
"""One compiled step for runs that differ in their learning rate alone.

Compiling a small model takes as long as hundreds of its steps. A run's own
step has the rate among its constants; here it is an argument, so that a sweep
of rates compiles once.
"""

import copy
import dataclasses
import functools

import jax
import numpy as np

from jaxsparse.config import Config, DataConfig
from jaxsparse.training.micro_batches import Batch, Metrics
from jaxsparse.training.step import TrainState, train_step


class AnyRateStep:
  """A run's jitted `train_step`, of which runs at other rates have the program.

  Rates are the same to the rounding of their schedule in float32.
  """

  def __init__(self, config: Config):
    self._rate = np.float32(config.optimizer.learning_rate)
    self._program = _program(_without_rate(config))

  def __call__(
    self, state: TrainState, batch: Batch, frozen: dict
  ) -> tuple[TrainState, Metrics]:
    return self._program(self._rate, state, batch, frozen)

  def lower(self, state: TrainState, batch: Batch, frozen: dict):
    """As that of what `jax.jit` returns."""
    return self._program.lower(self._rate, state, batch, frozen)


def _without_rate(config: Config) -> Config:
  """The same for all runs with one program: neither text nor base are in it."""
  data, train = config.data, config.train
  return dataclasses.replace(
    config,
    data=DataConfig(seq_len=data.seq_len, batch_size=data.batch_size),
    optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0),
    train=dataclasses.replace(
      train, start_from='base' if train.start_from else ''
    ),
  )


# Of the last few kinds of runs.
@functools.lru_cache(maxsize=4)
def _program(config: Config):
  def step(rate, state, batch, frozen):
    # A config that is made anew refuses a rate that is traced.
    optimizer, at_rate = copy.copy(config.optimizer), copy.copy(config)
    optimizer.learning_rate = rate
    at_rate.optimizer = optimizer
    return train_step(at_rate, state, batch, frozen)

  return jax.jit(step, donate_argnums=1)
