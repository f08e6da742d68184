"""The workdir: where training, inference and analysis meet."""

import json
import os
import pathlib
import tempfile

from etils import epath

from jaxsparse import saved_config
from jaxsparse.config import Config
from jaxsparse.errors import UserError

CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics.jsonl'
SAMPLES = 'samples.jsonl'
PLOTS = 'plots'
TENSORBOARD = 'tensorboard'


def read_config(workdir: epath.PathLike) -> Config:
  """The config with which the workdir was trained.

  Raises:
    UserError: the workdir or its config is missing or does not fit.
  """
  path = epath.Path(workdir) / CONFIG
  if not path.exists():
    raise UserError(
      f'workdir {str(workdir)!r} holds no {CONFIG}: give the --workdir of a '
      'training run.'
    )
  return saved_config.from_json(path.read_text())


def is_remote(workdir: epath.PathLike) -> bool:
  return '://' in str(workdir)


class Files:
  """A local folder for files that are appended to or drawn.

  It is the workdir itself, unless that is an object store such as gs://, which
  knows neither: then `sync` uploads what has changed since.
  """

  def __init__(self, workdir: epath.PathLike):
    self._remote = epath.Path(workdir) if is_remote(workdir) else None
    self.folder = pathlib.Path(
      tempfile.mkdtemp() if self._remote else os.fspath(workdir)
    )
    self._uploaded: dict[pathlib.Path, int] = {}

  def sync(self) -> None:
    """Uploads new and changed files; does nothing for a local workdir."""
    if self._remote is None:
      return
    for path in self.folder.rglob('*'):
      changed = path.stat().st_mtime_ns
      if path.is_file() and self._uploaded.get(path) != changed:
        target = self._remote / path.relative_to(self.folder).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        self._uploaded[path] = changed


def fetch(workdir: epath.PathLike, path: pathlib.Path) -> None:
  """Brings a file of an object store beside the others of `Files`."""
  remote = epath.Path(workdir) / path.name
  if is_remote(workdir) and remote.exists():
    path.write_bytes(remote.read_bytes())


def append_sample(workdir: epath.PathLike, sample: dict) -> None:
  """Adds one line to the samples of the workdir.

  Raises:
    UserError: they can't be written, as in a folder for reading only.
  """
  path = epath.Path(workdir) / SAMPLES
  line = (json.dumps(sample, ensure_ascii=False) + '\n').encode()
  try:
    if is_remote(workdir):
      before = path.read_bytes() if path.exists() else b''
      path.write_bytes(before + line)
    else:
      with path.open('ab') as file:
        file.write(line)
  except OSError as error:
    raise UserError(
      f"{str(path)!r} can't be written ({error.strerror or error})."
    ) from error
