# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of another workdir that a run began from.

A run settles once which one it is, in `start.json` of its workdir and in the
record of its checkpoints: `train.start_from` may name the newest, which another
start would find to be another.
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Literal

from etils import epath

from jaxsparse.config import Config, saved_config
from jaxsparse.config.errors import UserError, require
from jaxsparse.run import checkpoint, hosts, stored, trained
from jaxsparse.run import workdir as workdir_lib

FILE = 'start.json'


@dataclasses.dataclass(frozen=True)
class Start:
  """One checkpoint of a workdir."""

  workdir: str
  step: int
  # Of its parameters, see `stored.params_fingerprint`.
  fingerprint: str


def parse(text: str) -> tuple[str, int | Literal['best'] | None]:
  """The workdir and the step of 'WORKDIR[@STEP]'; None for the newest."""
  workdir, at, step = text.rpartition('@')
  if at and workdir and (step == 'best' or step.isdecimal()):
    return workdir_lib.expanded(workdir), trained.to_step(step)
  return workdir_lib.expanded(text), None


def source(config: Config) -> Start:
  """The checkpoint that `train.start_from` names.

  Raises:
    UserError: it is not there, or can't be read.
  """
  return checkpoint_of(config.train.start_from)


def checkpoint_of(text: str, name: str = 'train.start_from') -> Start:
  """The checkpoint that 'WORKDIR[@STEP]' names.

  Args:
    text: as `parse` takes it.
    name: of the setting or flag.

  Raises:
    UserError: it is not there, or can't be read.
  """
  workdir, named = parse(text)
  workdir_lib.require_reachable(workdir)
  steps = stored.steps_in(workdir)
  require(
    bool(steps),
    f'{name} must name a workdir with checkpoints, got {workdir!r}, '
    'which holds none.',
  )
  step = trained.step_of(workdir, named)
  step = steps[-1] if step is None else step
  require(
    step in steps,
    f'{name} must name a checkpoint of {workdir!r}, which has those '
    f'of steps {", ".join(map(str, steps))}; got @{step}.',
  )
  if not workdir_lib.is_remote(workdir):
    workdir = str(pathlib.Path(workdir).absolute())
  return Start(workdir, step, stored.params_fingerprint(workdir, step))


def settled(config: Config, workdir: epath.PathLike) -> Start | None:
  """Where the run of a workdir began; None if its parameters are its own.

  The first call settles it.

  Raises:
    UserError: it is not settled yet and can't be, or `start.json` is damaged.
  """
  if not config.train.start_from:
    return None
  path = epath.Path(workdir) / FILE
  if not path.exists():
    return settle(config, workdir)
  try:
    return Start(**json.loads(path.read_text()))
  except (OSError, ValueError, TypeError) as error:
    raise UserError(
      f"{str(path)!r} can't be read ({stored.first_line(error)}): remove it, "
      'and the next start settles anew where the run began.'
    ) from error


def recorded(workdir: epath.PathLike, record: dict) -> Start:
  """Where a run began, without settling anything.

  Args:
    workdir: of the run.
    record: of its newest checkpoint.
  """
  with contextlib.suppress(OSError, ValueError, TypeError):
    return Start(**json.loads((epath.Path(workdir) / FILE).read_text()))
  return Start(**record['start'])


def adapted(record: dict) -> Config | None:
  """The config of a run that trained an adapter; None of any other.

  Args:
    record: of a checkpoint.
  """
  if 'start' not in record or 'config' not in record:
    return None
  config = saved_config.from_json(record['config'])
  return config if config.adapter.kind else None


def base_of(workdir: epath.PathLike, record: dict) -> Start:
  """What the adapter of a run stands beside.

  Args:
    workdir: of the run.
    record: of its newest checkpoint.

  Raises:
    UserError: it is gone, or another by now.
  """
  found = recorded(workdir, record)
  where = f'step {found.step} of {found.workdir!r}'
  require(
    found.step in stored.steps_in(found.workdir),
    f'workdir {str(workdir)!r} holds an adapter of {where}, which is not '
    f'there: put it back, or name its new place in {FILE}.',
  )
  now = stored.params_fingerprint(found.workdir, found.step)
  require(
    now == found.fingerprint,
    f'workdir {str(workdir)!r} holds an adapter of {where}, which has other '
    'parameters by now: put those back.',
  )
  return found


def fingerprints(config: Config, workdir: epath.PathLike) -> list[str]:
  """Of the parameters that a workdir's adapters may stand beside.

  They are those of its checkpoints, the newest one last, and behind them the
  base of a run of an adapter.

  Args:
    config: of the workdir.
    workdir: of a run or a model.

  Raises:
    UserError: a checkpoint can't be read.
  """
  found = [
    stored.params_fingerprint(workdir, step)
    for step in stored.steps_in(workdir)
  ]
  if config.adapter.kind:
    record = checkpoint.read_record(workdir) or {}
    found.append(recorded(workdir, record).fingerprint)
  return found


def settle(config: Config, workdir: epath.PathLike) -> Start:
  """Writes down which checkpoint `train.start_from` names now."""
  found = source(config)
  if hosts.is_process_zero():
    with workdir_lib.write_errors(workdir):
      content = json.dumps(dataclasses.asdict(found), indent=2) + '\n'
      workdir_lib.write_whole(epath.Path(workdir) / FILE, content.encode())
  return found


def is_elsewhere(
  saved: Config, config: Config, workdir: epath.PathLike
) -> bool:
  """Whether a run's start has another name now, and is the same checkpoint.

  Args:
    saved: config of the starts before.
    config: of this one.
    workdir: of the run.

  Raises:
    UserError: there is nothing at the new name.
  """
  before, now = saved.train.start_from, config.train.start_from
  if before == now or not (before and now):
    return False
  known = settled(saved, workdir)
  return known is not None and source(config).fingerprint == known.fingerprint
