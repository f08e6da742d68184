# SPDX-License-Identifier: Apache-2.0
"""The tables of a workdir that lie in files, beside its checkpoints."""

import pathlib

import jax
from etils import epath

from jaxsparse.config.errors import require
from jaxsparse.run import row_store, table_leaves
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.row_store import RowStore

# Folder of the workdir for tables that are trained on file.
TABLES = 'tables'


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
