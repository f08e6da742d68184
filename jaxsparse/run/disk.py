# SPDX-License-Identifier: Apache-2.0
"""The disk that keeps checkpoints: whether they fit, what it says."""

import shutil
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxsparse.config.errors import UserError
from jaxsparse.run import stored
from jaxsparse.run import workdir as workdir_lib


def check_disk_space(workdir: epath.PathLike, num_bytes: int) -> None:
  """Refuses to start a run whose checkpoints would not fit a local disk.

  Args:
    workdir: an existing folder; remote ones are not checked.
    num_bytes: of the checkpoints that stand there at one time.

  Raises:
    UserError: there is less room than `num_bytes`.
  """
  if workdir_lib.is_remote(workdir):
    return
  free = shutil.disk_usage(workdir).free
  if free < num_bytes:
    raise UserError(
      f'workdir {str(workdir)!r} has {free / 2**20:.0f} MiB free, but its '
      f'checkpoints need {num_bytes / 2**20:.0f} MiB: make room, lower '
      'train.keep_checkpoints, or give another --workdir.'
    )


def guarded(directory: epath.Path, action: Callable[[], Any]) -> Any:
  """What the action returns.

  Args:
    directory: of the checkpoints, to which the action writes.
    action: it is called.

  Raises:
    UserError: the disk is full or not writable.
  """
  try:
    return action()
  except Exception as error:
    if directory.exists() and not directory.is_dir():
      raise UserError(
        f'{str(directory)!r} is a file where the checkpoints are to be: move '
        'it away or give another --workdir.'
      ) from error
    if not _is_disk_trouble(error):
      raise
    raise UserError(
      f'a checkpoint could not be written to {str(directory)!r}: make room '
      f'there or give another --workdir ({stored.first_line(error)}).'
    ) from error


def _is_disk_trouble(error: BaseException | None) -> bool:
  """Whether `error` or one of its causes is the file system's refusal."""
  while error is not None:
    text = str(error)
    if isinstance(error, OSError) or any(
      sign in text
      for sign in ('No space left', 'RESOURCE_EXHAUSTED', 'Permission denied')
    ):
      return True
    error = error.__cause__ or error.__context__
  return False
