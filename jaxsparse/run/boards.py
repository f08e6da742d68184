# SPDX-License-Identifier: Apache-2.0
"""Where people look at metrics: TensorBoard, and Weights & Biases if asked.

Neither is needed for anything else: `metrics.jsonl` has every row. What they
raise is for their caller to catch; only a missing package is a `UserError`.
"""

import dataclasses
import importlib.util
import json
import pathlib
import time
import uuid

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.run import workdir as workdir_lib

# Between two times that TensorBoard's events are brought to the disk.
_SECONDS = 30.0

# Holds the run's identifier at Weights & Biases.
_WANDB = 'wandb.json'


class TensorBoard:
  """Events of TensorBoard, written by the thread that calls.

  The writer of tensorboardX has a thread of its own, which a full disk ends:
  the next rows would wait for it forever.
  """

  name = 'TensorBoard'

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Hides what a longer run before this one wrote after `first_step`."""
    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self._first_step = folder, first_step
    self._events = None

  def _open(self) -> None:
    # It imports PyTorch where there is one: not before the first row.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import SessionLog

    # By the names' time alone, in seconds, two starts could be one.
    number = len(list(self._folder.iterdir()))
    self._events = EventsWriter(str(self._folder / 'events'), f'.{number:04}')
    start = SessionLog(status=SessionLog.START)
    self._add(step=self._first_step + 1, session_log=start)
    self.flush()

  def _add(self, **fields) -> None:
    from tensorboardX.proto.event_pb2 import Event

    self._events.write_event(Event(wall_time=time.time(), **fields))

  def write(self, step: int, scalars: dict[str, float | int]) -> None:
    from tensorboardX import summary

    if self._events is None:
      self._open()
    for name, value in scalars.items():
      self._add(step=step, summary=summary.scalar(name, value))
    if time.monotonic() - self._flushed > _SECONDS:
      self.flush()

  def flush(self) -> None:
    if self._events is not None:
      self._events.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    if self._events is not None:
      self._events.close()


class WandB:
  """A run of Weights & Biases; the same one after every start."""

  name = 'Weights & Biases'

  def __init__(self, folder: pathlib.Path, title: str, config: Config):
    """Goes on with the run whose identifier lies in `folder`, or begins one."""
    import wandb

    project = config.train.wandb_project
    self._run = wandb.init(
      project=project,
      id=_run_id(folder / _WANDB, project),
      # Steps that it has seen are repeated with the same figures, and ignored.
      resume='allow',
      name=title,
      dir=str(folder),
      config=dataclasses.asdict(config),
      settings=wandb.Settings(console='off'),
    )

  def write(self, step: int, scalars: dict[str, float | int]) -> None:
    self._run.log(scalars, step=step)

  def flush(self) -> None:
    """Does nothing: a process of its own sends what it is given."""

  def close(self) -> None:
    self._run.finish()


Board = TensorBoard | WandB


def _run_id(path: pathlib.Path, project: str) -> str:
  """The identifier of the workdir's run in a project, made the first time."""
  try:
    saved = json.loads(path.read_bytes())
    if saved['project'] == project:
      return saved['id']
  except (OSError, ValueError, TypeError, KeyError):
    pass
  new = dict(project=project, id=uuid.uuid4().hex[:16])
  workdir_lib.write_whole(path, json.dumps(new).encode())
  return new['id']


def require_packages(config: Config) -> None:
  """Checks that there is the package of every board that is asked for.

  Raises:
    UserError: there is not.
  """
  project = config.train.wandb_project
  if project and importlib.util.find_spec('wandb') is None:
    raise UserError(
      f'train.wandb_project = {project!r} needs a package: pip install '
      "'jaxsparse[wandb]', or leave the field out."
    )
