# SPDX-License-Identifier: Apache-2.0
"""The workdir: where training, inference and analysis meet."""

import contextlib
import json
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from jaxsparse.config import Config, saved_config
from jaxsparse.config.errors import UserError, require

CONFIG = 'config.json'
# One of them: of the tokenizers library, or of SentencePiece.
TOKENIZERS = ('tokenizer.json', 'tokenizer.model')
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics.jsonl'
SAMPLES = 'samples.jsonl'
PLOTS = 'plots'
TENSORBOARD = 'tensorboard'


def read_config(workdir: epath.PathLike) -> Config:
  """The config in the workdir's config.json.

  `run_config.read` also knows where there is a copy.

  Raises:
    UserError: the workdir or its config is missing or does not fit; a
      `saved_config.DamagedError` if nothing of it can be read.
  """
  require_reachable(workdir)
  path = epath.Path(workdir) / CONFIG
  if not path.exists():
    if (epath.Path(workdir) / CHECKPOINTS).exists():
      raise saved_config.DamagedError(f'{str(path)!r} is missing')
    raise UserError(
      f'workdir {str(workdir)!r} holds no {CONFIG}: give the --workdir of a '
      'training run.'
    )
  try:
    return saved_config.from_json(path.read_bytes().decode())
  except OSError as error:
    raise saved_config.DamagedError(
      f"{str(path)!r} can't be read ({error.strerror})"
    ) from error
  except (UnicodeDecodeError, saved_config.DamagedError) as error:
    raise saved_config.DamagedError(f'{str(path)!r} is damaged') from error


def has_tokenizer(workdir: epath.PathLike) -> bool:
  return any((epath.Path(workdir) / name).exists() for name in TOKENIZERS)


def holds_something(path: epath.Path) -> bool:
  """Whether a folder to be made holds what could be lost, or is a file."""
  return path.exists() and (not path.is_dir() or any(path.iterdir()))


def empty_folder(name: str) -> pathlib.Path:
  """A folder that a command is to make, of the name that it was given.

  Raises:
    UserError: it holds something.
  """
  folder = pathlib.Path(expanded(name))
  require(
    not holds_something(epath.Path(folder)),
    f'{str(folder)!r} must be new or an empty folder, but holds something: '
    'name another, or move it away.',
  )
  return folder


def is_remote(path: epath.PathLike) -> bool:
  return '://' in str(path)


def expanded(path: epath.PathLike) -> str:
  """The path with `~` as the home folder, as shells leave it in --workdir=~/x.

  Raises:
    UserError: there is no such home folder.
  """
  path = os.fspath(path)
  if not path.startswith('~'):
    return path
  try:
    return os.fspath(pathlib.Path(path).expanduser())
  except RuntimeError as error:
    raise UserError(
      f'{path!r} begins with a home folder that is unknown: write it out.'
    ) from error


def write_whole(path: epath.PathLike, content: bytes) -> None:
  """Writes a file whole: a kill or a power cut leaves the old or the new.

  Raises:
    OSError: it can't be written; the old one stays.
  """
  if is_remote(path):
    # So an object store does it.
    epath.Path(path).write_bytes(content)
    return
  path = pathlib.Path(path)
  partial = path.with_name(f'{path.name}.{uuid.uuid4().hex}')
  try:
    with partial.open('xb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
  # Some file systems refuse it for a folder.
  with contextlib.suppress(OSError):
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)


def make_folder(path: pathlib.Path, flag: str = '--workdir') -> None:
  """Makes a folder of a workdir, if it isn't there.

  Args:
    path: of the folder.
    flag: what names another one.

  Raises:
    UserError: it can't be made, or a file stands there or a link, by which a
      workdir of others could choose what is written to.
  """
  if path.is_symlink() or (path.exists() and not path.is_dir()):
    raise UserError(
      f'{str(path)!r} must be a folder, but is a file or a link: move it away.'
    )
  with write_errors(path.parent if flag == '--workdir' else path, flag):
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def write_errors(
  folder: epath.PathLike, flag: str = '--workdir'
) -> Iterator[None]:
  """Says in a sentence why nothing can be written to a folder.

  Args:
    folder: the workdir, or where else something is to be written.
    flag: what names another one.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{flag.strip('-')} {str(folder)!r} can't be written "
      f'({error.strerror or error}): give another {flag} or make room.'
    ) from error


def require_reachable(workdir: epath.PathLike) -> None:
  """Asks an object store whether it is there, a local folder nothing.

  Raises:
    UserError: the store is unknown, its library is missing, or it can't be
      reached.
  """
  if not is_remote(workdir):
    return
  try:
    epath.Path(workdir).exists()
  except Exception as error:
    why = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise UserError(
      f"workdir {str(workdir)!r} can't be reached ({why}): install what reads "
      'that store, such as gcsfs for gs:// and s3fs for s3://, or name a local '
      'folder.'
    ) from error


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
    UserError: they can't be written, as in a folder for reading only, or lead
      elsewhere: a workdir of others may not choose what is written to.
  """
  path = epath.Path(workdir) / SAMPLES
  line = json.dumps(sample, ensure_ascii=False) + '\n'
  content = line.encode('utf-8', 'backslashreplace')
  try:
    if is_remote(workdir):
      before = path.read_bytes() if path.exists() else b''
      path.write_bytes(before + content)
    else:
      _append(path, content)
  except OSError as error:
    raise UserError(
      f"{str(path)!r} can't be written ({error.strerror or error})."
    ) from error


def _append(path: epath.Path, content: bytes) -> None:
  flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
  with open(os.open(path, flags, 0o666), 'r+b', buffering=0) as file:  # noqa: PTH123
    size = file.seek(0, os.SEEK_END)
    # A full disk may have cut the line before.
    if size and os.pread(file.fileno(), 1, size - 1) != b'\n':
      content = b'\n' + content
    file.write(content)
