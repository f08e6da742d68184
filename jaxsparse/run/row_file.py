# SPDX-License-Identifier: Apache-2.0
"""A file of rows that numpy and JAX read and write as an array in memory.

The file holds the rows one after another and nothing else, little endian.
Mapping takes no time and no memory, whatever its size; pages come with the rows
that are read. What was never written is a hole, which reads as zeros and takes
no disk.
"""

import contextlib
import errno
import mmap
import os
import pathlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxsparse.config.errors import UserError

# Not in the module before Python 3.13. Without it the kernel refuses a private
# map that is larger than all memory.
_NORESERVE = 0x4000 if sys.platform == 'linux' else 0x40

_DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'int32': np.dtype(np.int32),
  'uint8': np.dtype(np.uint8),
}


def dtype_of(name: str) -> np.dtype:
  """The numpy type of rows that a manifest names; KeyError for others."""
  return _DTYPES[name]


class RowFile:
  """The rows of one file, [M, W] or [M].

  Attributes:
    rows: all of them, a view of the file. Writing to it writes to the file, or,
      where the map is private, to a copy of the page in this process's memory.
  """

  def __init__(
    self,
    path: pathlib.Path,
    shape: tuple[int, ...],
    dtype: str,
    is_private: bool = True,
  ):
    """Maps an existing file.

    Args:
      path: of a file that is as long as the rows.
      shape: [M, W] or [M].
      dtype: of the values: 'float32', 'bfloat16', 'int32' or 'uint8'.
      is_private: whether what is written stays in this process. The file may
        then be one for reading only.

    Raises:
      UserError: it can't be opened, or has another length.
    """
    self.path = path
    self._type = dtype_of(dtype)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * self._type.itemsize
    flags = os.O_RDONLY if is_private else os.O_RDWR
    kind = mmap.MAP_PRIVATE | _NORESERVE if is_private else mmap.MAP_SHARED
    with _open_errors(path):
      self._file = os.open(path, flags | os.O_CLOEXEC)
    try:
      found = os.fstat(self._file).st_size
      if found != num_bytes:
        raise UserError(
          f'{str(path)!r} must have {num_bytes:,} bytes, {list(shape)} of '
          f'{dtype}, but has {found:,}: it is damaged or of another model.'
        )
      self._map = mmap.mmap(self._file, num_bytes, flags=kind)
    except BaseException:
      os.close(self._file)
      raise
    # Else the kernel reads 128 KiB for each row.
    self._map.madvise(mmap.MADV_RANDOM)
    self.rows = np.frombuffer(self._map, self._type).reshape(shape)

  def keep(self, what: Any) -> None:
    """Keeps an object alive as long as any array shows the rows."""
    weakref.finalize(self._map, lambda _: None, what)

  def array(self) -> jax.Array:
    """The rows as an array of the default CPU device, without a copy.

    JAX takes it for constant: wait for what reads it before rows are written,
    and never donate it.
    """
    return shown(self.rows)

  def data_ranges(self) -> Iterator[tuple[int, int]]:
    """Ranges of bytes, begin and end, outside of which all is zero."""
    end = 0
    while True:
      try:
        begin = os.lseek(self._file, end, os.SEEK_DATA)
      except OSError as error:
        if error.errno == errno.ENXIO:  # There is a hole up to the end.
          return
        raise
      end = os.lseek(self._file, begin, os.SEEK_HOLE)
      yield begin, end

  def put(self, ids: np.ndarray, rows: np.ndarray) -> None:
    self.rows[ids] = rows

  def flush(self) -> None:
    """Returns when the disk has what was written to the rows."""
    os.fsync(self._file)

  def read_ahead(self) -> None:
    """Asks for all rows to be brought into memory."""
    self._map.madvise(mmap.MADV_NORMAL)
    self._map.madvise(mmap.MADV_WILLNEED)

  def drop_pages(self) -> None:
    """Gives back the memory of a shared map; the system's cache may keep it."""
    self._map.madvise(mmap.MADV_DONTNEED)

  def disk_bytes(self) -> int:
    """What the file takes on the disk; holes take nothing."""
    return os.fstat(self._file).st_blocks * 512

  def close(self) -> None:
    """Closes the file; the map goes with the last array that shows it."""
    if self._file >= 0:
      os.close(self._file)
      self._file = -1


def shown(array: np.ndarray) -> jax.Array:
  """An array of the default CPU device that is the same memory."""
  return jax.dlpack.from_dlpack(_Exported(array))


def create(path: pathlib.Path, shape: tuple[int, ...], dtype: str) -> None:
  """Makes a file of zeros that takes no disk, in place of any that was there.

  Raises:
    OSError: it can't be made.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
  descriptor = os.open(path, flags, 0o666)
  try:
    size = int(np.prod(shape, dtype=np.int64)) * dtype_of(dtype).itemsize
    os.ftruncate(descriptor, size)
  finally:
    os.close(descriptor)


def resident_file_bytes() -> int:
  """Bytes of mapped files in this process's memory; 0 where it is unknown."""
  try:
    fields = pathlib.Path('/proc/self/statm').read_text().split()
  except OSError:
    return 0
  return int(fields[2]) * mmap.PAGESIZE


@contextlib.contextmanager
def _open_errors(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except PermissionError as error:
    raise UserError(
      f'{str(path)!r} must be a file that may be written, as training changes '
      'its rows: give it that permission, or copy the workdir (cp '
      '--sparse=always).'
    ) from error
  except OSError as error:
    raise UserError(
      f"{str(path)!r} can't be opened ({error.strerror}): it belongs to the "
      'tables of the workdir.'
    ) from error


class _Exported:
  """A numpy array as DLPack has it, bfloat16 too, which numpy does not export.

  Of the standard's struct only the code of the type is changed.
  """

  def __init__(self, array: np.ndarray):
    self._is_narrow = array.dtype == ml_dtypes.bfloat16
    self._array = array.view(np.uint16) if self._is_narrow else array

  def __dlpack_device__(self) -> tuple[int, int]:
    return self._array.__dlpack_device__()

  def __dlpack__(self, **_):
    capsule = self._array.__dlpack__()
    if self._is_narrow:
      _set_bfloat16(capsule)
    return capsule


def _set_bfloat16(capsule) -> None:
  """Makes 16-bit integers of a DLPack capsule bfloat16 (kDLBfloat = 4)."""
  import ctypes

  get = ctypes.pythonapi.PyCapsule_GetPointer
  get.restype, get.argtypes = (
    ctypes.c_void_p,
    [ctypes.py_object, ctypes.c_char_p],
  )
  # DLTensor: the data's address, two int32 of the device, int32 of dimensions.
  ctypes.c_uint8.from_address(get(capsule, b'dltensor') + 20).value = 4
