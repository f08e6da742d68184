# SPDX-License-Identifier: Apache-2.0
"""Tables in files: opened at once, changed row by row, never half saved.

A store is a folder:

  NAME.rows       the rows of one leaf, a table or a state of its optimizer
  steps/STEP.json of each sealed step: what the leaves are, their fingerprints
  undo/STEP       what rows held at that step that were overwritten since
  lock            held while the store is open

The rows of the files are those of the last write. Those of a sealed step are
these with the journals of that step and of later ones undone, so a step is
sealed at the cost of what was touched, and earlier steps can still be had until
they are forgotten.

Opening takes constant time and memory: it checks the seal of the step, the
lengths of the files and the checksums of the journals that it undoes. What the
files hold is compared with the fingerprints by `verify`, which reads all that
is no hole.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import mmap
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.config.errors import UserError, require
from jaxsparse.run import row_file, row_undo
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.row_hashes import hashes_of
from jaxsparse.run.row_lock import Lock
from jaxsparse.run.row_steps import (
  STEPS,
  Leaf,
  described,
  leaves_of,
  read_step,
  rows_path,
  sealed_steps,
  step_name,
  step_path,
)
from jaxsparse.run.workdir import write_whole

_UNDO = 'undo'


@dataclasses.dataclass(frozen=True)
class Change:
  """New rows of leaves that have their numbers in common.

  Attributes:
    ids: numbers of the rows, distinct, int64 [n].
    rows: of each leaf by its name.
  """

  ids: np.ndarray
  rows: Mapping[str, np.ndarray]


class RowStore:
  """An open store."""

  def __init__(
    self,
    folder: pathlib.Path,
    leaves: Mapping[str, Leaf],
    sums: dict[str, np.ndarray],
    step: int | None,
    lock: 'Lock',
    is_private: bool,
  ):
    """Use `create` and `open_at`."""
    self.folder, self.leaves, self.step = folder, dict(leaves), step
    # Of what JSON can hold: what the rows are from. It is sealed with a step.
    self.origin: Any = None
    # Without the rows that were noted since a step was sealed: these count
    # again at the next, once, however often they are written until then.
    self._sums = sums
    self._lock = lock
    self._is_private = is_private
    # Of programs and libraries.
    self._bytes_before = row_file.resident_file_bytes()
    # Whether there are pages that no file has.
    self._has_copies = False
    self._journal: row_undo.Journal | None = None
    self._is_noted: dict[tuple, np.ndarray] = {}
    self.files: dict[str, RowFile] = {}
    for name, leaf in leaves.items():
      path = rows_path(folder, name)
      file = RowFile(path, leaf.shape, leaf.dtype, is_private)
      self.files[name] = file
      # Others may train when the last array of the rows has gone.
      file.keep(lock)

  def fill(self, name: str, first_row: int, rows: np.ndarray) -> None:
    """Writes rows of a leaf, before any step is sealed, each once."""
    self.fill_some(name, np.arange(first_row, first_row + len(rows)), rows)

  def fill_some(self, name: str, ids: np.ndarray, rows: np.ndarray) -> None:
    """`fill` of the rows with these numbers; the others stay zeros."""
    assert self.step is None
    self.files[name].put(ids, rows)
    self._count(name, ids, rows)

  def _count(
    self, name: str, ids: np.ndarray, rows: np.ndarray, is_off: bool = False
  ) -> None:
    """Adds rows to the sums of a leaf, or takes them off."""
    at = np.subtract.at if is_off else np.add.at
    stripe = ids // self.leaves[name].stripe_rows
    at(self._sums[name], stripe, hashes_of(rows, ids))

  def note(self, before: Sequence[row_undo.Before]) -> None:
    """Keeps what rows are that `write` will change.

    Args:
      before: rows as they are, of leaves that are always written together.

    Raises:
      UserError: the disk is full or not writable.
    """
    with _write_errors(self.folder):
      self._require_room(before)
      new = [b for b in map(self._first_touched, before) if len(b.ids)]
      if new and self._journal is not None:
        self._journal.append(new)

  def write(self, changes: Sequence[Change]) -> None:
    """Overwrites rows of which `note` has what they were."""
    for change in changes:
      for name, rows in change.rows.items():
        self.files[name].put(change.ids, rows)

  def _require_room(self, before: Sequence[row_undo.Before]) -> None:
    """Refuses what the disk may have no room for.

    Where a page of a map finds none, the system ends the process.
    """
    num_pages = sum(len(b.ids) * len(b.rows) for b in before)
    if shutil.disk_usage(self.folder).free < 2 * num_pages * mmap.PAGESIZE:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def _first_touched(self, before: row_undo.Before) -> row_undo.Before:
    """Those of the rows that the journal does not have yet, as bytes."""
    names = tuple(before.rows)
    num_rows = self.leaves[names[0]].num_rows
    if names not in self._is_noted:
      # A bit a row; the system gives memory for the pages that are written.
      self._is_noted[names] = np.zeros(-(-num_rows // 8), np.uint8)
    bits = self._is_noted[names]
    byte, bit = before.ids >> 3, (1 << (before.ids & 7)).astype(np.uint8)
    is_new = bits[byte] & bit == 0
    np.bitwise_or.at(bits, byte, bit)
    ids = before.ids[is_new]
    rows = {n: rows[is_new] for n, rows in before.rows.items()}
    for name in rows if len(ids) else ():
      self._count(name, ids, rows[name], is_off=True)
    return row_undo.Before(
      ids, {n: row_undo.as_bytes(x) for n, x in rows.items()}
    )

  def seal(self, step: int) -> str:
    """Makes the rows those of `step`, to which the store can be opened.

    Returns:
      A digest of the step, which a checkpoint records.

    Raises:
      UserError: the disk is full or not writable.
    """
    if step == self.step and not self._is_noted:
      return self.digest
    with _write_errors(self.folder):
      for names, bits in self._is_noted.items():
        for name in names:
          size = self.leaves[name].stripe_rows
          for ids in _numbers(bits, size):
            self._count(name, ids, self.files[name].rows[ids])
      self._is_noted = {}
      for file in self.files.values():
        file.flush()
      content = described(step, self.leaves, self._sums, self.origin)
      write_whole(step_path(self.folder, step), json.dumps(content).encode())
      self._begin_journal(step)
    return self.digest

  @property
  def digest(self) -> str:
    """Of the sealed step."""
    assert self.step is not None
    return read_step(self.folder, self.step)['digest']

  def _begin_journal(self, step: int) -> None:
    if self._journal is not None:
      self._journal.close()
    self._journal = row_undo.Journal(self.folder / _UNDO / step_name(step))
    _sync_folder(self.folder / _UNDO)
    self._is_noted = {}
    self.step = step

  def forget_before(self, step: int) -> None:
    """Gives up the steps before this one."""
    with _write_errors(self.folder):
      # First what leads to them.
      for part in (STEPS, _UNDO):
        for path in (self.folder / part).iterdir():
          if path.stem.isdecimal() and int(path.stem) < step:
            path.unlink()

  def undo(self) -> None:
    """Brings the rows to those of the step at which the store was opened.

    What is put back into files is on the disk before the journals go; a kill
    in between leaves it to the next start.
    """
    assert self.step is not None
    steps = sealed_steps(self.folder)
    later = [s for s in steps if s >= self.step]
    for step in reversed(later):
      path = self.folder / _UNDO / step_name(step)
      if not path.exists():
        require(
          step == later[-1],
          f'{str(path)!r} is missing, without which the tables of step '
          f"{self.step} can't be had: copy the workdir from where it is whole.",
        )
        continue
      for before in row_undo.read(path):
        for name, rows in before.rows.items():
          leaf = self.leaves[name]
          dtype = row_file.dtype_of(leaf.dtype)
          shape = (len(rows), *leaf.shape[1:])
          old = rows.view(dtype).reshape(shape)
          self.files[name].put(before.ids, old)
          self._has_copies = self._is_private
    if self._is_private:
      return
    with _write_errors(self.folder):
      for file in self.files.values():
        file.flush()
      for step in reversed(later[1:]):
        step_path(self.folder, step).unlink()
        _sync_folder(self.folder / STEPS)
        (self.folder / _UNDO / step_name(step)).unlink(missing_ok=True)
      self._begin_journal(self.step)

  def verify(self) -> None:
    """Compares all rows with the fingerprints of the step.

    Raises:
      UserError: some differ; the sentence names the file and where.
    """
    for name, leaf in self.leaves.items():
      file, size = self.files[name], leaf.stripe_rows
      found = np.zeros_like(self._sums[name])
      for ids in self._written(name):
        np.add.at(found, ids // size, hashes_of(file.rows[ids], ids))
        self.limit_memory(2**28)
      for stripe in np.flatnonzero(found != self._sums[name])[:1]:
        first = int(stripe) * size
        last = min(first + size, leaf.num_rows) - 1
        raise UserError(
          f'{str(file.path)!r} is damaged: rows {first:,} to {last:,} differ '
          f'from those of step {self.step}; copy the workdir from where it is '
          'whole.'
        )

  def touched(self, name: str) -> Iterator[np.ndarray]:
    """Numbers of rows that are not zero, int64, some at a time."""
    for ids in self._written(name):
      rows = self.files[name].rows[ids]
      yield ids[rows.reshape(len(rows), -1).any(axis=1)]

  def _written(self, name: str) -> Iterator[np.ndarray]:
    """Numbers of all rows outside of holes, some at a time, ascending."""
    leaf = self.leaves[name]
    held, num_held, end = [], 0, 0
    for begin_byte, end_byte in self.files[name].data_ranges():
      begin = max(end, begin_byte // leaf.row_bytes)
      end = max(begin, -(-end_byte // leaf.row_bytes))
      while end - begin + num_held >= leaf.stripe_rows:
        first, begin = begin, begin + leaf.stripe_rows - num_held
        yield np.concatenate([*held, np.arange(first, begin)])
        held, num_held = [], 0
      held.append(np.arange(begin, end))
      num_held += end - begin
    if num_held:
      yield np.concatenate(held)

  def limit_memory(self, most_bytes: int) -> None:
    """Gives memory of maps back if they hold more; changes nothing else."""
    held = row_file.resident_file_bytes() - self._bytes_before
    if self._has_copies or held <= most_bytes:
      return
    for file in self.files.values():
      file.drop_pages()

  def close(self) -> None:
    """Lets others open the store. Arrays of its rows can still be read."""
    if self._journal is not None:
      self._journal.close()
      self._journal = None
    for file in self.files.values():
      file.close()
    self._lock.close()


def create(folder: pathlib.Path, leaves: Mapping[str, Leaf]) -> RowStore:
  """A store of zeros, in place of one that is there; `seal` completes it.

  Raises:
    UserError: it can't be written, or is in use.
  """
  with _write_errors(folder):
    for part in (STEPS, _UNDO):
      (folder / part).mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, fcntl.LOCK_EX)
    for step in reversed(sealed_steps(folder)):
      step_path(folder, step).unlink()
    _sync_folder(folder / STEPS)
    for path in (folder / _UNDO).iterdir():
      path.unlink()
    for name, leaf in leaves.items():
      row_file.create(rows_path(folder, name), leaf.shape, leaf.dtype)
  sums = {n: np.zeros(x.num_stripes, np.uint32) for n, x in leaves.items()}
  return RowStore(folder, leaves, sums, None, lock, is_private=False)


def open_at(
  folder: pathlib.Path, step: int, is_private: bool = True
) -> RowStore:
  """A store as it was when a step was sealed.

  Args:
    folder: of the store.
    step: a sealed one.
    is_private: whether files stay as they are: later changes are undone in this
      process's memory. Else they are undone for good.

  Raises:
    UserError: it has no such step, is damaged or in use.
  """
  kind = fcntl.LOCK_SH if is_private else fcntl.LOCK_EX
  require(
    (folder / STEPS).is_dir(),
    f'{str(folder)!r} must hold the tables of the checkpoint, but is no store '
    'of rows: copy the workdir whole.',
  )
  lock = Lock(folder, kind)
  try:
    content = read_step(folder, step)
    leaves, sums = leaves_of(folder, step, content)
    store = RowStore(folder, leaves, sums, step, lock, is_private)
    store.origin = content.get('origin')
    store.undo()
  except BaseException:
    lock.close()
    raise
  return store


def _numbers(bits: np.ndarray, size: int) -> Iterator[np.ndarray]:
  """Places of the bits that are set, at most `size` at a time, ascending."""
  for first in range(0, len(bits), 2**20):
    part = np.unpackbits(bits[first : first + 2**20], bitorder='little')
    found = np.flatnonzero(part) + 8 * first
    for begin in range(0, len(found), size):
      yield found[begin : begin + size]


def _sync_folder(folder: pathlib.Path) -> None:
  # Some file systems refuse it for a folder.
  with contextlib.suppress(OSError):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


@contextlib.contextmanager
def _write_errors(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f"the tables in {str(folder)!r} can't be written ({error.strerror}): "
      'make room there, or give another --workdir.'
    ) from error
