# SPDX-License-Identifier: Apache-2.0
"""The tables of a workdir that lie in files, beside its checkpoints."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxsparse.config.errors import require
from jaxsparse.run import disk, row_store, stored, table_leaves
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.row_store import RowStore

# What shows the rows of a file to programs: an array, or what fetches them.
Show = Callable[[RowFile], Any]

# Folder of the workdir for tables that are trained on file.
TABLES = 'tables'
# Folder of the workdir for those of checkpoints that have them as arrays.
CONVERTED = 'mapped_tables'

# For those who want the parameters without their tables.
NONE = 'none'

# Memory of mapped files while they are written.
_MOST_BYTES = 2**28


def folder_of(workdir: epath.PathLike) -> pathlib.Path:
  """Where the tables of a run are that has them on file.

  Raises:
    UserError: the workdir is an object store, which maps no files.
  """
  require(
    not workdir_lib.is_remote(workdir),
    f'tables on file need a workdir on a local disk, got {str(workdir)!r}.',
  )
  return pathlib.Path(workdir).resolve() / TABLES


def open_at(
  workdir: epath.PathLike,
  step: int,
  digest: str | None,
  is_private: bool = True,
) -> RowStore:
  """The tables of a checkpoint.

  Args:
    workdir: of a training run.
    step: of the checkpoint.
    digest: of the tables, as its record has it.
    is_private: see `row_store.open_at`.

  Raises:
    UserError: they are not there, damaged, in use, or of another run.
  """
  folder = folder_of(workdir)
  store = row_store.open_at(folder, step, is_private)
  if store.digest != digest:
    store.close()
    require(
      False,
      f'the tables in {str(folder)!r} are not those of the checkpoint of step '
      f'{step}: copy the workdir from where it is whole.',
    )
  return store


def read_params(
  workdir: epath.PathLike,
  step: int,
  abstract: Any,
  tables: str,
  say: Callable[[str], None],
  show: Show,
) -> Any:
  """The parameters of one checkpoint with their tables.

  Args:
    workdir: see `checkpoint.load_params`, as for the others.
    step: of the checkpoint.
    abstract: likewise.
    tables: likewise.
    say: likewise.
    show: likewise.

  Raises:
    DamageError: it is not what was saved.
    UserError: what `stored.read` raises, or there are no such tables.
  """
  directory = stored.folder_of(workdir)
  if tables == 'file' and not stored.tables_on_file(directory, step):
    rest, _ = stored.read_some(directory, step, lambda path: not is_table(path))
    found = converted(workdir, step, say, show)
    return table_leaves.joined(rest, found)
  arrays, record = stored.read(
    directory, step, abstract and {stored.PARAMS: abstract}
  )
  if table_leaves.ON_FILE not in record or tables == NONE:
    return arrays[stored.PARAMS]
  found = mapped(workdir, step, record, tables or 'file', show)
  return table_leaves.joined(arrays[stored.PARAMS], found)


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
    files = open_at(workdir, step, digest).files
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


def mapped(
  workdir: epath.PathLike,
  step: int,
  record: dict,
  where: str = 'file',
  show: Show = RowFile.array,
) -> dict[str, Any]:
  """The tables of a checkpoint that has them on file.

  Args:
    workdir: of a training run.
    step: of the checkpoint.
    record: of the checkpoint.
    where: they are to lie: 'file' or 'host', which are mapped for reading, the
      latter all read at once; or 'device', which copies them.
    show: makes of a file what stands for the table.

  Raises:
    UserError: the tables are not there, damaged, in use, or of another run; or
      there are several devices to read them.
  """
  store = open_at(workdir, step, record[table_leaves.ON_FILE])
  return _arrays(store, where, show)


def converted(
  workdir: epath.PathLike,
  step: int,
  say: Callable[[str], None],
  show: Show = RowFile.array,
) -> dict[str, Any]:
  """The tables of a checkpoint that has them among its arrays, mapped.

  The first call writes them to a store in the workdir, one table after another;
  later ones open it. The store keeps the fingerprints that the checkpoint has.

  Args:
    workdir: of a training run.
    step: of the checkpoint.
    say: gets a sentence if a store is made.
    show: makes of a file what stands for the table.

  Raises:
    DamageError: the checkpoint is not what was saved.
    UserError: the store can't be written, or is damaged.
  """
  checkpoints = stored.folder_of(workdir)
  folder = folder_of(workdir).parent / CONVERTED / str(step)
  expected = stored.fingerprints_of(checkpoints, step)
  expected = {name: of for name, of in expected.items() if is_table(name)}
  if not expected:
    return {}
  if row_store.sealed_steps(folder):
    store = row_store.open_at(folder, step)
    if store.origin == expected:
      return _arrays(store, 'file', show)
    store.close()
  shapes = stored.shapes_of(checkpoints, step)
  leaves = {
    name: row_store.Leaf(*shapes[name].shape, str(shapes[name].dtype))
    for name in expected
  }
  num_bytes = sum(x.num_rows * x.row_bytes for x in leaves.values())
  say(
    f'Writing the tables of step {step} to {str(folder)!r}, '
    f'{num_bytes / 2**20:,.0f} MiB, which later starts open at once.'
  )
  disk.check_disk_space(workdir, num_bytes)
  store = row_store.create(folder, leaves)
  store.origin = expected
  for name, leaf in leaves.items():
    rows = _read_table(checkpoints, step, name)
    for first in range(0, leaf.num_rows, leaf.stripe_rows):
      store.fill(name, first, rows[first : first + leaf.stripe_rows])
    store.limit_memory(_MOST_BYTES)
  store.seal(step)
  store.close()
  return _arrays(row_store.open_at(folder, step), 'file', show)


def is_table(path: str) -> bool:
  """Whether a leaf of that path is a table, or an array of a quantized one."""
  return any(part in table_leaves.NAMES for part in path.split('/')[-2:])


def on_mesh() -> jax.sharding.Sharding | None:
  """How a mapped table lies on the mesh in use; None without one."""
  used = jax.sharding.get_mesh()
  return None if used.empty else jax.sharding.NamedSharding(used, jax.P())


def placed(files: dict[str, RowFile]) -> dict[str, jax.Array]:
  """Arrays that show the rows, on the mesh in use."""
  return {name: on_own_mesh(file.array()) for name, file in files.items()}


def on_own_mesh(array: jax.Array) -> jax.Array:
  """The array on the mesh in use, which has one device; no copy."""
  sharding = on_mesh()
  if sharding is None:
    return array
  return jax.make_array_from_single_device_arrays(
    array.shape, sharding, [array]
  )


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
