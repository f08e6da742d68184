# SPDX-License-Identifier: Apache-2.0
"""One start at a time on a workdir.

The lock is the system's, on a file in the workdir: it ends with the process
that holds it, however that ends, and file systems that computers share know it
too. The file itself stays; it only says who holds the lock.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator

from etils import epath

from jaxsparse.config.errors import UserError
from jaxsparse.run import hosts
from jaxsparse.run import workdir as workdir_lib

LOCK = 'run.lock'

# This process's own, and since when: the system would give it a lock that it
# holds once more, and takes both back when it closes the file, opened by whom
# and for what ever.
_held: dict[pathlib.Path, dict] = {}


@contextlib.contextmanager
def held(
  workdir: epath.PathLike, say: Callable[[str], None] = print
) -> Iterator[None]:
  """Keeps other starts from the workdir until the block ends.

  Of several processes process 0 holds the lock for all.

  Args:
    workdir: made where it is missing.
    say: gets a sentence where two starts can't be distinguished.

  Raises:
    UserError: another start holds it, in every process; or it can't be written.
  """
  with contextlib.ExitStack() as stack:
    trouble = ''
    if hosts.is_process_zero():
      try:
        _take(workdir_lib.expanded(workdir), say, stack)
      except UserError as error:
        trouble = str(error)
    # Else the others would wait for a process 0 that has gone.
    if trouble := hosts.gather(trouble)[0]:
      raise UserError(trouble)
    yield


def _take(
  workdir: str, say: Callable[[str], None], stack: contextlib.ExitStack
) -> None:
  """Holds the lock until `stack` is closed."""
  if workdir_lib.is_remote(workdir):
    say(
      f'{workdir} knows no locks: see to it that nothing else trains in this '
      'workdir.'
    )
    return
  path = pathlib.Path(workdir).resolve() / LOCK
  if path in _held:
    raise UserError(_refusal(workdir, _held[path]))
  with workdir_lib.write_errors(workdir):
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o666)
  stack.callback(os.close, descriptor)
  try:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EAGAIN, errno.EACCES):
      raise UserError(_refusal(workdir, _read_holder(descriptor))) from error
    say(
      f'The file system of {workdir!r} knows no locks ({error.strerror}): see '
      'to it that nothing else trains in this workdir.'
    )
    return
  since = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
  holder = dict(host=socket.gethostname(), pid=os.getpid(), since=since)
  _held[path] = holder
  stack.callback(_held.pop, path)
  with contextlib.suppress(OSError):  # On a full disk it holds all the same.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> dict | None:
  """Who holds the lock, which it may be about to write."""
  for _ in range(20):
    try:
      return json.loads(os.pread(descriptor, 1000, 0))
    except ValueError:
      time.sleep(0.05)
  return None


def _refusal(workdir: str, holder: dict | None) -> str:
  who = (
    'process {pid} on {host} since {since}'.format(**holder)
    if holder
    else 'another process'
  )
  return (
    f'workdir {workdir!r} is in use by {who}: wait until it ends, stop it, or '
    'give another --workdir.'
  )
