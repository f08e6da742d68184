# SPDX-License-Identifier: Apache-2.0
"""How much memory can still be had: of a device, or of the host."""

import os
import pathlib
from collections.abc import Iterator

import jax


def of_device(device: jax.Device) -> int | None:
  """Bytes that `device` still has for arrays, or None where it is not known.

  A CPU's are the host's, which forced CPU devices share.
  """
  if device.platform == 'cpu':
    return of_host()
  stats = device.memory_stats() or {}
  limit, used = stats.get('bytes_limit'), stats.get('bytes_in_use', 0)
  return None if limit is None else max(limit - used, 0)


def of_host(root: pathlib.Path = pathlib.Path('/')) -> int | None:
  """Bytes that this process can still have, or None where it is not known.

  On Linux what the kernel and the control groups of the process leave, without
  swap, which is no place for arrays; elsewhere all that is built in.

  Args:
    root: of the file system whose `proc` and `sys` are read.
  """
  limits = [*_of_kernel(root), *_of_groups(root)]
  if limits:
    return max(min(limits), 0)
  try:
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, ValueError, OSError):
    return None


def words(num_bytes: int) -> str:
  """As people say it: '1.5 GiB'."""
  for unit, size in (('TiB', 2**40), ('GiB', 2**30), ('MiB', 2**20)):
    if num_bytes >= size:
      return f'{num_bytes / size:,.1f} {unit}'
  return f'{num_bytes / 2**10:.1f} KiB'


def _of_kernel(root: pathlib.Path) -> Iterator[int]:
  for line in _lines(root / 'proc/meminfo'):
    if line.startswith('MemAvailable:'):
      yield int(line.split()[1]) * 1024


def _of_groups(root: pathlib.Path) -> Iterator[int]:
  """What each control group around this process leaves, of version 1 and 2."""
  for line in _lines(root / 'proc/self/cgroup'):
    _, controllers, path = line.split(':', 2)
    if not controllers:
      base, files = 'sys/fs/cgroup', ('memory.max', 'memory.current')
    elif 'memory' in controllers.split(','):
      base = 'sys/fs/cgroup/memory'
      files = ('memory.limit_in_bytes', 'memory.usage_in_bytes')
    else:
      continue
    group = root / base
    yield from _of_group(group, *files)
    # In a container the path may be that of the host, of which only the end is
    # mounted: then the first folder is the group's own.
    for part in path.strip().strip('/').split('/'):
      group /= part
      yield from _of_group(group, *files)


def _of_group(
  folder: pathlib.Path, of_limit: str, of_usage: str
) -> Iterator[int]:
  limit = ''.join(_lines(folder / of_limit)).strip()
  usage = ''.join(_lines(folder / of_usage)).strip()
  if limit.isdigit() and usage.isdigit():
    # Copies of files count as used, but go when others want the room.
    stat = dict(line.split()[:2] for line in _lines(folder / 'memory.stat'))
    copies = sum(
      int(stat.get(f'total_{name}', stat.get(name, 0)))
      for name in ('inactive_file', 'active_file')
    )
    yield int(limit) - int(usage) + copies


def _lines(path: pathlib.Path) -> list[str]:
  try:
    return path.read_text().splitlines()
  except OSError:
    return []
