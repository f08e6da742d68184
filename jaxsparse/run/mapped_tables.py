# SPDX-License-Identifier: Apache-2.0
"""Parameters whose tables are mapped files: those of a run, or made of them.

Of a checkpoint that has its tables as arrays, or for rows of another form, they
are written to a folder of the workdir once, some rows at a time; later starts
open it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxsparse.config.errors import require
from jaxsparse.run import disk, row_store, stored, table_files, table_leaves
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.row_store import Leaf, RowStore
from jaxsparse.run.table_files import is_table

# What shows the rows of a file to programs: an array, or what fetches them.
Show = Callable[[RowFile], Any]

# Folder of the workdir for what is written here.
CONVERTED = 'mapped_tables'

# For those who want the parameters without their tables.
NONE = 'none'

# Memory of mapped files while they are written.
_MOST_BYTES = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """Another form of rows, in which a row of zeros is of zero bytes.

  Attributes:
    name: of the form, for a folder.
    num_bytes: of a row, by the numbers that it has.
    encode: makes rows [n, S] of uint8 of float rows [n, W].
    table: makes what stands for a table of what shows its rows, and of W.
  """

  name: str
  num_bytes: Callable[[int], int]
  encode: Callable[[np.ndarray], np.ndarray]
  table: Callable[[Any, int], Any]

  def leaf(self, of: Leaf) -> Leaf:
    """What the rows of a file are that are made of those of another."""
    bytes_, kind = (
      self.num_bytes(of.width),
      dict(form=self.name, width=of.width),
    )
    return Leaf(of.num_rows, bytes_, 'uint8', kind)


def read_params(
  workdir: epath.PathLike,
  step: int,
  abstract: Any,
  tables: str,
  say: Callable[[str], None],
  show: Show,
  form: Form | None = None,
) -> Any:
  """The parameters of one checkpoint with their tables.

  Args:
    workdir: see `checkpoint.load_params`, as for the others.
    step: of the checkpoint.
    abstract: likewise.
    tables: likewise.
    say: likewise.
    show: likewise.
    form: likewise.

  Raises:
    DamageError: it is not what was saved.
    UserError: what `stored.read` raises, or there are no such tables.
  """
  directory = stored.folder_of(workdir)
  has_files = stored.tables_on_file(directory, step) is not None
  where = tables or ('file' if has_files else 'device')
  is_mapped = where == 'file' or (where == 'host' and has_files)
  if is_mapped and (form or not has_files):
    rest, record = stored.read_some(
      directory, step, lambda path: not is_table(path)
    )
    found = _made(workdir, step, record, where, say, show, form)
    return table_leaves.joined(rest, found)
  arrays, record = stored.read(
    directory, step, abstract and {stored.PARAMS: abstract}
  )
  if not has_files or tables == NONE:
    return arrays[stored.PARAMS]
  store = table_files.open_at(workdir, step, record[table_leaves.ON_FILE])
  return table_leaves.joined(arrays[stored.PARAMS], _arrays(store, where, show))


def readers(
  workdir: epath.PathLike, step: int
) -> dict[str, Callable[[], np.ndarray]]:
  """What reads the rows of each table of a checkpoint, by its path.

  Args:
    workdir: of a training run.
    step: of the checkpoint.

  Raises:
    DamageError: the checkpoint can't be read.
    UserError: its tables are on file, and damaged or in use.
  """
  directory = stored.folder_of(workdir)
  if digest := stored.tables_on_file(directory, step):
    files = table_files.open_at(workdir, step, digest).files
    return {
      name: functools.partial(getattr, file, 'rows')
      for name, file in files.items()
      if is_table(name)
    }
  return {
    name: functools.partial(_read_table, directory, step, name)
    for name in stored.shapes_of(directory, step)
    if is_table(name)
  }


def _read_table(directory: epath.Path, step: int, name: str) -> np.ndarray:
  read, _ = stored.read_some(directory, step, lambda path: path == name)
  return np.asarray(table_leaves.split(read)[1][name])


def _made(
  workdir: epath.PathLike,
  step: int,
  record: dict,
  where: str,
  say: Callable[[str], None],
  show: Show,
  form: Form | None,
) -> dict[str, Any]:
  """The tables of a checkpoint, from files that are made of it.

  Their store keeps what the checkpoint says its tables are.
  """
  origin = record.get(table_leaves.ON_FILE)
  if origin is None:
    of_all = stored.fingerprints_of(stored.folder_of(workdir), step)
    origin = {name: of for name, of in of_all.items() if is_table(name)}
  if not origin:
    return {}
  folder = table_files.folder_of(workdir).parent / CONVERTED / str(step)
  if form:
    folder = folder.with_name(f'{step}_{form.name}')
  if row_store.sealed_steps(folder):
    store = row_store.open_at(folder, step)
    if store.origin == origin:
      return _tables(store, where, show, form)
    store.close()
  _write(workdir, step, record, folder, origin, say, form)
  return _tables(row_store.open_at(folder, step), where, show, form)


def _write(
  workdir: epath.PathLike,
  step: int,
  record: dict,
  folder: pathlib.Path,
  origin: Any,
  say: Callable[[str], None],
  form: Form | None,
) -> None:
  """Makes the store in `folder`."""
  digest = record.get(table_leaves.ON_FILE)
  source = _Arrays(workdir, step)
  if digest is not None:
    source = _Files(table_files.open_at(workdir, step, digest))
  leaves = source.leaves
  if form:
    leaves = {name: form.leaf(leaf) for name, leaf in leaves.items()}
  num_bytes = sum(x.num_rows * x.row_bytes for x in leaves.values())
  say(
    f'Writing the tables of step {step} to {str(folder)!r}, '
    f'{num_bytes / 2**20:,.0f} MiB, which later starts open at once.'
  )
  disk.check_disk_space(workdir, int(source.share_of_disk * num_bytes))
  store = row_store.create(folder, leaves)
  store.origin = origin
  for name in leaves:
    for ids, rows in source.rows(name):
      store.fill_some(name, ids, form.encode(rows) if form else rows)
      store.limit_memory(_MOST_BYTES)
  store.seal(step)
  store.close()
  source.close()


Rows = Iterator[tuple[np.ndarray, np.ndarray]]


class _Arrays:
  """The tables that are arrays of a checkpoint, one of them in memory."""

  # Of the bytes of all rows.
  share_of_disk = 1.0

  def __init__(self, workdir: epath.PathLike, step: int):
    self._folder, self._step = stored.folder_of(workdir), step
    shapes = stored.shapes_of(self._folder, step)
    self.leaves = {
      name: Leaf(*x.shape, str(x.dtype))
      for name, x in shapes.items()
      if is_table(name)
    }

  def rows(self, name: str) -> Rows:
    """All rows and their numbers, some at a time."""
    table = _read_table(self._folder, self._step, name)
    size = self.leaves[name].stripe_rows
    for first in range(0, len(table), size):
      rows = table[first : first + size]
      yield np.arange(first, first + len(rows)), rows

  def close(self) -> None:
    pass


class _Files:
  """The tables that a run has on file."""

  def __init__(self, store: RowStore):
    self._store = store
    self.leaves = {n: x for n, x in store.leaves.items() if is_table(n)}
    held = sum(store.files[name].disk_bytes() for name in self.leaves)
    whole = sum(x.num_rows * x.row_bytes for x in self.leaves.values())
    # Where nothing was written, nothing is.
    self.share_of_disk = min(1.0, held / whole)

  def rows(self, name: str) -> Rows:
    """The rows that are not zero and their numbers, some at a time."""
    for ids in filter(len, self._store.touched(name)):
      yield ids, self._store.files[name].rows[ids]
      self._store.limit_memory(_MOST_BYTES)

  def close(self) -> None:
    self._store.close()


def _tables(
  store: RowStore, where: str, show: Show, form: Form | None
) -> dict[str, Any]:
  found = _arrays(store, where, show)
  if form is None:
    return found
  return {
    name: form.table(rows, store.leaves[name].row_format['width'])
    for name, rows in found.items()
  }


def _arrays(store: RowStore, where: str, show: Show) -> dict[str, Any]:
  num_devices = max(1, jax.sharding.get_mesh().size)
  require(
    num_devices == 1,
    f'the tables in {str(store.folder)!r} are on file, which one device reads, '
    f'got a mesh of {num_devices}.',
  )
  files = {name: file for name, file in store.files.items() if is_table(name)}
  if where != 'file':
    for file in files.values():
      file.read_ahead()
  if where == 'device':
    return {name: jnp.array(file.rows) for name, file in files.items()}
  # A file keeps its map as long as its rows are shown.
  return {name: show(file) for name, file in files.items()}
