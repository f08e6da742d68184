# SPDX-License-Identifier: Apache-2.0
"""Metrics to files: one JSON object a line, and to boards for people."""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.run import boards, hosts
from jaxsparse.run import workdir as workdir_lib

# None for what was not finite.
Row = dict[str, float | int | None]

# Metrics of former versions, by the last part of their names.
RENAMED = dict(
  block_price='sparsity_loss',
  slots_used='usage_fraction',
  experts_used='usage_fraction',
  unevenness='usage_kl',
  load_max='usage_max',
)


def read_rows(workdir: epath.PathLike) -> list[Row]:
  """The rows written so far; what can't be read is left out.

  Such as the last line, if a kill cut it short. Metrics of former versions have
  the names of this one.

  Raises:
    UserError: the file can't be read.
  """
  return _parse(_read(workdir))[0]


def _read(workdir: epath.PathLike) -> bytes:
  path = epath.Path(workdir) / workdir_lib.METRICS
  try:
    return path.read_bytes() if path.exists() else b''
  except OSError as error:
    raise UserError(
      f"{str(path)!r} can't be read ({error.strerror}): move it away."
    ) from error


def _parse(content: bytes) -> tuple[list[Row], int]:
  """The rows, and how many lines but the last are none."""
  *lines, last = content.split(b'\n')
  found = [_to_row(line) for line in lines]
  rows = [row for row in found if row is not None]
  num_damaged = len(found) - len(rows)
  if (row := _to_row(last)) is not None:
    rows.append(row)
  return rows, num_damaged


def _to_row(line: bytes) -> Row | None:
  """The row of a line; None if it is none."""
  try:
    row = json.loads(line)
    if not isinstance(row, dict) or type(row.get('step')) is not int:
      return None
    for value in row.values():
      if type(value) not in (int, float, type(None)):
        return None
      float(value or 0)
  except (ValueError, OverflowError, RecursionError):
    return None
  return {_renamed(name): value for name, value in row.items()}


def _renamed(name: str) -> str:
  layer, slash, last = name.rpartition('/')
  return layer + slash + RENAMED.get(last, last)


def validation_losses(workdir: epath.PathLike) -> dict[int, float]:
  """Nats per target of each validation pass written so far, by step."""
  name = 'validation_loss'
  rows = [row for row in read_rows(workdir) if name in row]
  # What is not finite is written as null.
  return {r['step']: math.nan if r[name] is None else r[name] for r in rows}


class MetricsWriter:
  """Appends rows, after forgetting those that the resumed run will repeat.

  Only process 0 writes. What can't be written, as the disk
  is full, waits until it can.
  """

  def __init__(
    self,
    config: Config,
    workdir: epath.PathLike,
    first_step: int,
    say: Callable[[str], None] = print,
  ):
    """Begins to write after `first_step`, the step of the checkpoint or 0.

    Args:
      config: of the run.
      workdir: an existing folder.
      first_step: rows after it are forgotten; if it is 0 all are set aside.
      say: gets what was found damaged, and once what can't be written.

    Raises:
      UserError: the workdir can't be written, or a board needs a package.
    """
    boards.require_packages(config)
    self._file = None
    if not hosts.is_process_zero():
      return
    self._workdir, self._say = epath.Path(workdir), say
    self._told: set[str] = set()
    self._waiting: list[str] = []
    self._files = workdir_lib.Files(workdir)
    path = self._files.folder / workdir_lib.METRICS
    with workdir_lib.write_errors(workdir):
      kept = self._keep(first_step)
      workdir_lib.write_whole(path, ''.join(map(_to_line, kept)).encode())
      self._file = path.open('ab', buffering=0)
      self._size = path.stat().st_size
    self._boards: list[boards.Board] = []
    folder = self._files.folder
    tensorboard = folder / workdir_lib.TENSORBOARD
    self._open(boards.TensorBoard, tensorboard, first_step)
    if config.train.wandb_project:
      self._open(boards.WandB, folder, self._workdir.name, config)

  def _keep(self, first_step: int) -> list[Row]:
    """The rows up to a step; of others that will not come again a copy."""
    path = self._workdir / workdir_lib.METRICS
    if path.is_dir():
      aside = self._free_name()
      path.rename(self._workdir / aside)
      self._say(f'{str(path)!r} was a folder: it is {aside} now.')
    content = _read(self._workdir)
    rows, num_damaged = _parse(content)
    why = ''
    if not first_step and rows:
      why = (
        f'There is no checkpoint, so the run begins anew: the {len(rows):,} '
        f'rows of its metrics so far are'
      )
    elif num_damaged:
      why = (
        f'{num_damaged:,} lines of {str(path)!r} are damaged and left out: the '
        'file as it was is'
      )
    if why:
      aside = self._free_name()
      workdir_lib.write_whole(self._workdir / aside, content)
      self._say(f'{why} kept as {aside}.')
    if not first_step:
      return []
    return [row for row in rows if row['step'] <= first_step]

  def _free_name(self) -> str:
    stem, end = workdir_lib.METRICS.split('.')
    names = (f'{stem}.{i}.{end}' for i in itertools.count(1))
    return next(n for n in names if not (self._workdir / n).exists())

  def write(self, step: int, scalars: Row) -> None:
    if self._file is None:
      return
    self._waiting.append(_to_line({'step': step, **scalars}))
    self._append()
    for board in tuple(self._boards):
      self._guard(board, lambda board=board: board.write(step, scalars))

  def _append(self, sync: bool = False) -> None:
    """Writes the rows that wait, all of them or none."""
    content = ''.join(self._waiting).encode()
    try:
      left = memoryview(content)
      while left:
        left = left[self._file.write(left) :]
      if sync:
        os.fsync(self._file.fileno())
    except OSError as error:
      # Part of a row would spoil the next one.
      with contextlib.suppress(OSError):
        self._file.truncate(self._size)
      self._tell(
        f"{workdir_lib.METRICS} can't be written ({error.strerror}): its rows "
        'wait until they can be.'
      )
      return
    self._size += len(content)
    self._waiting.clear()

  def _open(self, board: type, *args: Any) -> None:
    try:
      self._boards.append(board(*args))
    except Exception as error:  # Disks and networks fail in many ways.
      self._drop(board.name, error)

  def _guard(self, board: boards.Board, action: Callable[[], None]) -> None:
    try:
      action()
    except Exception as error:
      self._boards.remove(board)
      self._drop(board.name, error)
      with contextlib.suppress(Exception):
        board.close()

  def _drop(self, name: str, error: Exception) -> None:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    self._tell(
      f'{name} gets no more rows in this start ({why}): {workdir_lib.METRICS} '
      'has all.'
    )

  def _tell(self, sentence: str) -> None:
    if sentence not in self._told:
      self._told.add(sentence)
      self._say(sentence)

  def sync(self) -> None:
    """Brings rows to the disk, and of a remote workdir to its store."""
    if self._file is None:
      return
    self._append(sync=True)
    for board in tuple(self._boards):
      self._guard(board, board.flush)
    self._upload()

  def _upload(self) -> None:
    try:
      self._files.sync()
    except Exception as error:  # Every store has exceptions of its own.
      why = (str(error).splitlines() or [type(error).__name__])[0]
      self._tell(
        f"{str(self._workdir)!r} can't be written ({why}): metrics wait until "
        'it can be.'
      )

  def close(self) -> None:
    if self._file is None:
      return
    self._append(sync=True)
    if self._waiting:
      self._say(
        f'{len(self._waiting):,} rows of {workdir_lib.METRICS} could not be '
        'written.'
      )
    with contextlib.suppress(OSError):
      self._file.close()
    for board in tuple(self._boards):
      self._guard(board, board.close)
    self._boards.clear()
    self._upload()
    self._file = None


def _to_line(row: Row) -> str:
  # JSON has no NaN, and a reader should not need Python's dialect.
  finite = {
    k: None if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in row.items()
  }
  return json.dumps(finite) + '\n'
