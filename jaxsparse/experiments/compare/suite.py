# SPDX-License-Identifier: Apache-2.0
"""What a comparison is: a budget, architectures, seeds, data."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxsparse import config as config_lib
from jaxsparse.analysis import budget
from jaxsparse.analysis.budget import Architecture as Architecture
from jaxsparse.config import Config
from jaxsparse.config.errors import require
from jaxsparse.data import facts
from jaxsparse.data.needles import Needles
from jaxsparse.experiments.compare.continual import Continual
from jaxsparse.experiments.compare.continual import Method as Method
from jaxsparse.run import recipe_files

DENSE = 'dense'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """A comparison; a file in `configs/compare/` builds one."""

  # The dense model, whose forward FLOPs per token all architectures have, and
  # the data, optimizer and number of steps of all. Its vocab_size must be set,
  # because the logits are part of the budget.
  base: Config
  # Parameters of each sparse architecture, without embeddings and gains; unused
  # if there is none.
  total_parameters: int = 0
  # By the names that tables and plots show; each name is a folder's, too.
  architectures: Mapping[str, Architecture]
  # One run of everything for each.
  seeds: tuple[int, ...] = (0, 1, 2)
  # Numbers of people of generated biographies, one run of everything for each;
  # with none, the text is the base's.
  people: tuple[int, ...] = ()
  # With people, unless 0: training lasts until a fact (of a person who is not
  # famous) was seen so often, instead of the base's number of steps.
  exposures: int = 0
  # Different biographies of each person.
  num_phrasings: int = 16
  # Documents that end with questions on their beginning, instead of a text.
  needles: Needles | None = None
  # Widths of MLPs and experts are multiples of this.
  width_multiple: int = 1
  # Each architecture is one step further than the one before it, and the table
  # shows what the step changed.
  is_walk: bool = False
  # What the trained models learn beside what they know.
  continual: Continual | None = None

  def __post_init__(self):
    require(
      self.base.model.vocab_size > 0,
      'base.model.vocab_size must be set in a suite, got 0.',
    )
    require(bool(self.architectures), 'a suite needs an architecture.')
    require(bool(self.seeds), 'a suite needs a seed.')
    for field in ('seeds', 'people'):
      values = getattr(self, field)
      require(
        len(set(values)) == len(values),
        f'{field} must differ from each other, got {values}.',
      )
    for name, architecture in self.architectures.items():
      require(
        name.replace('_', '').replace('-', '').isalnum(),
        f'an architecture is named by letters, digits, - and _; got {name!r}.',
      )
      require(
        architecture.memory is None or architecture.moe is None,
        f'architecture {name!r} has both memory and moe: set one of them.',
      )
      rate = architecture.lr_per_person
      require(
        rate == 0 or (rate > 0 and bool(self.people)),
        f'lr_per_person of {name!r} must be positive, in a suite with '
        f'people, or 0; got {rate}.',
      )
    texts = dict(
      people=self.people,
      needles=self.needles,
      text=self.base.data.text or self.base.data.tfds,
    )
    given = [name for name, text in texts.items() if text]
    require(
      len(given) <= 1,
      f'{" and ".join(given)} exclude each other: set one of them.',
    )
    seq_len = self.base.data.seq_len
    require(
      self.needles is None or self.needles.seq_len == seq_len,
      'a row must be one document of needles: base.data.seq_len is '
      f'{seq_len}, but documents have '
      f'{self.needles.seq_len if self.needles else 0} tokens.',
    )
    require(
      self.exposures >= 0,
      f'exposures must be at least 0, got {self.exposures}.',
    )
    require(
      not (self.exposures and not self.people),
      'exposures are those of facts: set people, too.',
    )
    require(
      self.continual is None
      or (len(self.architectures) == 1 and len(self.people) == 1),
      'continual follows on one architecture and one number of people, got '
      f'{len(self.architectures)} and {len(self.people)}.',
    )
    require(self.width_multiple > 0, 'width_multiple must be positive.')
    require(self.num_phrasings > 0, 'num_phrasings must be positive.')


def num_steps(suite: Suite, people: int) -> int:
  """How long the runs on a number of people, or on a text, are."""
  if not suite.exposures:
    return suite.base.train.num_steps
  data = suite.base.data
  tokens = facts.num_tokens(suite.exposures, people)
  return math.ceil(tokens / (data.batch_size * data.seq_len))


def config_of(suite: Suite, name: str) -> Config:
  """The config of an architecture's runs.

  Raises:
    UserError: the architecture does not fit the budget.
  """
  architecture = suite.architectures[name]
  base = suite.base
  model = budget.fit(
    base.model,
    name,
    architecture,
    total_parameters=suite.total_parameters,
    seq_len=base.data.seq_len,
    width_multiple=suite.width_multiple,
  )
  return config_lib.validated(
    dataclasses.replace(
      base,
      model=model,
      optimizer=dataclasses.replace(
        base.optimizer, **dict(architecture.optimizer)
      ),
      # One checkpoint to go on from is enough for runs of minutes.
      train=dataclasses.replace(
        base.train, keep_checkpoints=1, sample_tokens=0
      ),
    )
  )


def load(path: str) -> Suite:
  """The suite of a file, or of a name in configs/compare.

  Raises:
    UserError: there is no such file, or it makes no valid suite.
  """
  return recipe_files.load(
    '--suite', path, 'configs/compare', 'get_suite', Suite
  )


def restrict(
  suite: Suite,
  *,
  only: tuple[str, ...] = (),
  seeds: tuple[int, ...] = (),
  people: tuple[int, ...] = (),
  num_steps: int = 0,
  text: str = '',
) -> Suite:
  """The suite with less in it, or on another text.

  Args:
    suite: as its file has it.
    only: names of architectures to keep, or of the methods of `continual`; all
      by default.
    seeds: instead of the suite's.
    people: instead of the suite's.
    num_steps: instead of the suite's, and of its exposures.
    text: globs of files to train on, for a suite without people.

  Raises:
    UserError: an architecture is unknown, or something does not fit the suite.
  """
  named = suite.architectures
  if suite.continual is not None:
    named = suite.continual.methods
  unknown = [name for name in only if name not in named]
  require(
    not unknown,
    f'--only names {", ".join(unknown)}, but the suite has {", ".join(named)}.',
  )
  kept = {name: x for name, x in named.items() if not only or name in only}
  require(
    not (people and not suite.people),
    '--people needs a suite of generated biographies, such as '
    'configs/compare/facts.py.',
  )
  require(
    not (text and (suite.people or suite.needles)),
    '--text needs a suite of language, such as configs/compare/cpu.py.',
  )
  base = suite.base
  if text:
    data = dataclasses.replace(base.data, text=text)
    base = dataclasses.replace(base, data=data)
  if num_steps:
    train = dataclasses.replace(base.train, num_steps=num_steps)
    base = dataclasses.replace(base, train=train)
  parts: dict[str, Any] = dict(architectures=kept)
  if suite.continual is not None:
    parts = dict(continual=dataclasses.replace(suite.continual, methods=kept))
  return dataclasses.replace(
    suite,
    base=config_lib.validated(base),
    **parts,
    seeds=seeds or suite.seeds,
    people=people or suite.people,
    exposures=0 if num_steps else suite.exposures,
  )
