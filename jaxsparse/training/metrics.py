"""Metrics to files: one JSON object a line, and TensorBoard events."""

import json
import math

import tensorboardX
from etils import epath

from jaxsparse import hosts
from jaxsparse import workdir as workdir_lib

Row = dict[str, float | int]


def read_rows(workdir: epath.PathLike) -> list[Row]:
  """The rows written so far; a last line that a kill cut short is left out."""
  path = epath.Path(workdir) / workdir_lib.METRICS
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return rows


class MetricsWriter:
  """Appends rows, after forgetting those that the resumed run will repeat.

  Only the lead of several processes writes.
  """

  def __init__(self, workdir: epath.PathLike, first_step: int):
    self._file = None
    if not hosts.is_lead():
      return
    kept = [r for r in read_rows(workdir) if r['step'] <= first_step]
    self._files = workdir_lib.Files(workdir)
    path = self._files.folder / workdir_lib.METRICS
    new = path.with_suffix('.new')
    new.write_text(''.join(map(_to_line, kept)))
    new.replace(path)
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(
      str(self._files.folder / workdir_lib.TENSORBOARD),
      purge_step=first_step + 1,
    )

  def write(self, step: int, scalars: Row) -> None:
    if self._file is None:
      return
    self._file.write(_to_line({'step': step, **scalars}))
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def sync(self) -> None:
    """Brings the rows to a remote workdir; local ones are there already."""
    if self._file is not None:
      self._files.sync()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()
      self._files.sync()


def _to_line(row: Row) -> str:
  # JSON has no NaN, and a reader should not need Python's dialect.
  finite = {
    k: None if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in row.items()
  }
  return json.dumps(finite) + '\n'
