# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison, before any is trained."""

import dataclasses
import math
import pathlib

from jaxsparse.config import Config
from jaxsparse.data import facts
from jaxsparse.data.needles import Needles
from jaxsparse.experiments.compare import suite as suite_lib
from jaxsparse.experiments.compare.continual import Continual
from jaxsparse.experiments.compare.suite import Suite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
  """What a run begins with: the model of another run, and what it knows."""

  # The workdir of the other run.
  folder: pathlib.Path
  # People whose facts it was trained on.
  people: int
  # Of their text.
  data_folder: pathlib.Path
  # Share of their text in each batch.
  replay_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training run of a comparison."""

  architecture: str
  seed: int
  # Number of people of generated biographies; 0 for other text.
  people: int
  # Without the files and the split of generated text, which do not exist yet.
  config: Config
  num_phrasings: int
  needles: Needles | None
  folder: pathlib.Path
  # Holds what the runs of one seed share.
  data_folder: pathlib.Path
  # None of a run whose parameters are drawn.
  known: Known | None = None
  # Whether other runs begin with its model.
  keeps_checkpoints: bool = False

  @property
  def title(self) -> str:
    people = f', {self.people:,} people' if self.people else ''
    if self.known:
      people = (
        f' at {self.config.optimizer.learning_rate:g}, {self.people:,} new '
        'people'
      )
    return f'{self.architecture}{people}, seed {self.seed}'


def plan(suite: Suite, workdir: str) -> list[Run]:
  """All runs, in an order that completes each seed before the next begins.

  Raises:
    UserError: an architecture does not fit the budget.
  """
  configs = {
    name: suite_lib.config_of(suite, name) for name in suite.architectures
  }
  runs = []
  for seed in suite.seeds:
    for people in suite.people or (0,):
      for name, config in configs.items():
        steps = suite_lib.num_steps(suite, people)
        train = dataclasses.replace(config.train, seed=seed, num_steps=steps)
        optimizer = config.optimizer
        if limit := suite.architectures[name].lr_per_person:
          rate = min(optimizer.learning_rate, limit / people)
          optimizer = dataclasses.replace(optimizer, learning_rate=rate)
        group = f'people_{people:06}' if people else 'text'
        kind = 'needles' if suite.needles else 'facts'
        runs.append(
          Run(
            architecture=name,
            seed=seed,
            people=people,
            config=dataclasses.replace(
              config, train=train, optimizer=optimizer
            ),
            num_phrasings=suite.num_phrasings,
            needles=suite.needles,
            folder=pathlib.Path(workdir) / 'runs' / group / f'{name}_{seed}',
            data_folder=pathlib.Path(workdir) / kind / f'{group}_{seed}',
            keeps_checkpoints=suite.continual is not None,
          )
        )
        if suite.continual is not None:
          runs += _continued(suite.continual, runs[-1], pathlib.Path(workdir))
  return runs


def _continued(
  continual: Continual, base: Run, workdir: pathlib.Path
) -> list[Run]:
  """What each method does from a base, at each of its rates."""
  runs = []
  group = f'people_{base.people:06}_and_{continual.people:06}'
  data = base.config.data
  tokens = facts.num_tokens(continual.exposures, continual.people)
  for name, method in continual.methods.items():
    per_step = data.batch_size * data.seq_len * (1 - method.replay_share)
    train = dataclasses.replace(
      base.config.train,
      num_steps=math.ceil(tokens / per_step),
      start_from=str(base.folder),
    )
    for rate in method.rates:
      optimizer = dataclasses.replace(
        base.config.optimizer, learning_rate=rate, **continual.optimizer
      )
      config = dataclasses.replace(
        base.config, train=train, optimizer=optimizer, adapter=method.adapter
      )
      runs.append(
        Run(
          architecture=name,
          seed=base.seed,
          people=continual.people,
          config=config,
          num_phrasings=base.num_phrasings,
          needles=None,
          folder=workdir / 'runs' / group / f'{name}_{rate:g}_{base.seed}',
          data_folder=workdir / 'facts' / f'{group}_{base.seed}',
          known=Known(
            folder=base.folder,
            people=base.people,
            data_folder=base.data_folder,
            replay_share=method.replay_share,
          ),
        )
      )
  return runs
