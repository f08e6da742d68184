# SPDX-License-Identifier: Apache-2.0
"""What of a changed config a run can go on with, and what that does."""

import math
from collections.abc import Callable
from typing import Any

from jaxsparse.config import Config, saved_config
from jaxsparse.run.field_meanings import LANES, TEXT, TOKENIZER, meaning_of
from jaxsparse.training import schedules


def judge(old: Config, new: Config) -> tuple[dict[str, str], list[str]]:
  """What `new` changes that a run can't go on with, with why, and what it can.

  Without the data, of which names are not enough to judge.
  """
  refused, accepted = {}, []
  for name, (before, after) in saved_config.differences(old, new).items():
    change = f'{name}: {before!r} -> {after!r}'
    if name in (*TEXT, *TOKENIZER, LANES):
      accepted.append(change)
      continue
    meaning = meaning_of(name, before, after, old)
    if not meaning.is_allowed:
      refused[change] = meaning.text
      continue
    accepted.append(f'{change} ({meaning.text})' if meaning.text else change)
  return refused, accepted


def rates(old: Config, new: Config, step: int) -> list[str]:
  """Learning rates that jump at a step, as 'learning rate at step ...'."""
  found = []
  by_name: dict[str, Callable[..., Any]] = {
    'the learning rate': schedules.learning_rate
  }
  if new.model.memory:
    by_name['that of the value tables'] = schedules.value_learning_rate
  for name, schedule in by_name.items():
    before, after = (
      float(schedule(c.optimizer, c.train.num_steps)(step)) for c in (old, new)
    )
    if not math.isclose(before, after, rel_tol=1e-5):
      found.append(f'{name} at step {step}: {before:.3g} -> {after:.3g}')
  return found
