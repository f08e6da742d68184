# SPDX-License-Identifier: Apache-2.0
"""Who may open a row store: one that trains, or any number that read.

The lock is the system's and goes with the process, however that ends.
"""

import errno
import fcntl
import os
import pathlib
from collections.abc import Callable

from jaxsparse.config.errors import UserError

_LOCK = 'lock'


class Lock:
  """The store's lock, held until it is closed or nobody refers to it."""

  def __init__(self, folder: pathlib.Path, kind: int):
    self._file = -1
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    if kind == fcntl.LOCK_EX:
      flags |= os.O_CREAT
    try:
      self._file = os.open(folder / _LOCK, flags, 0o666)
      fcntl.flock(self._file, kind | fcntl.LOCK_NB)
    except FileNotFoundError:
      return  # A copy without it, which nobody trains.
    except OSError as error:
      if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        return  # The file system knows no locks.
      self.close()
      raise UserError(
        f'the tables in {str(folder)!r} are in use by another process, and '
        'one that trains needs them alone: wait until it ends, or stop it.'
      ) from error

  # Bound here: the module may be gone before the last lock is.
  def close(self, close: Callable[[int], None] = os.close) -> None:
    if self._file >= 0:
      close(self._file)
      self._file = -1

  __del__ = close
