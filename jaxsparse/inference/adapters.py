# SPDX-License-Identifier: Apache-2.0
"""Trained models with the adapters of theirs.

A run of an adapter has checkpoints of it alone: its base is found by its
record. Any adapter in files is put beside the parameters that it was trained
with. Where these are floats it is merged, W + s A B in their place; beside a
quantized matrix it stays, as it was in training. So are differences of rows,
where a table of floats lies on the device.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import unflatten_dict

from jaxsparse.config import AdapterConfig, Config, ModelConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.inference import quantized_leaves
from jaxsparse.inference.quantize import Quantization, parse, quantize
from jaxsparse.nn import adapters, row_deltas
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.run import adapter_files, checkpoint, mapped_tables, start
from jaxsparse.run import workdir as workdir_lib


class _Folders(argparse.Action):
  """A flag of folders, with commas between or of several each."""

  def __call__(self, parser, namespace, values, option_string=None):
    found = [workdir_lib.expanded(x) for x in str(values).split(',') if x]
    setattr(namespace, self.dest, [*getattr(namespace, self.dest), *found])


def add_flags(parser: argparse.ArgumentParser) -> None:
  """`--adapter`, and `--force` for those of another base."""
  parser.add_argument(
    '--adapter',
    action=_Folders,
    default=[],
    metavar='FOLDER',
    help='an adapter to add, such as RUN/adapters/NAME, of several each',
  )
  parser.add_argument(
    '--force',
    action='store_true',
    help='add an adapter that was trained beside other parameters, too',
  )


def load_params(
  workdir: epath.PathLike,
  step: int | None = None,
  say: Callable[[str], None] | None = None,
  abstract: Any = None,
  tables: str = '',
  how: Quantization | None = None,
) -> tuple[int, Any]:
  """`quantized_leaves.load_params`, of runs of an adapter, too.

  Args:
    workdir: see there.
    step: likewise.
    say: likewise.
    abstract: of the model.
    tables: where they are to lie.
    how: likewise, of a run without an adapter.

  Raises:
    UserError: as there, or the base of an adapter is gone or another.
  """
  record = checkpoint.read_record(workdir) or {}
  saved = start.adapted(record)
  if saved is None:
    return quantized_leaves.load_params(
      workdir, step, say, abstract, tables, how
    )
  # Rows are few, and only the checkpoint knows how many: they are read whole.
  is_of_rows = saved.adapter.kind == 'rows'
  places = (
    None if is_of_rows else abstract and _abstract(saved.adapter, abstract)
  )
  step, adapter = checkpoint.load_params(workdir, step, say, places)
  base = start.base_of(workdir, record)
  _, params = load_params(base.workdir, base.step, say, abstract, tables)
  if is_of_rows and tables == mapped_tables.NONE:
    return step, params
  with _mesh_of(abstract):
    if how := parse(saved.adapter.quantize):
      params = quantize(saved.model, params, how)
    if is_of_rows:
      found = {'/'.join(p): x for p, x in adapters.leaves(adapter).items()}
      tensors = jax.device_get(found)
      return step, _with_rows(saved.model, params, tensors, workdir, tables)
    return step, _beside(saved.adapter, params, adapter, str(workdir))


def load_base(
  config: Config,
  workdir: epath.PathLike,
  step: int | None = None,
  say: Callable[[str], None] | None = None,
  abstract: Any = None,
  tables: str = '',
) -> tuple[int, Any]:
  """`load_params` of what a run begins with, quantized as its adapter asks."""
  step, params = load_params(workdir, step, say, abstract, tables)
  if how := parse(config.adapter.quantize):
    params = quantize(config.model, params, how)
  return step, params


def _abstract(config: AdapterConfig, params: Any) -> Any:
  """Shapes and shardings of an adapter, of those of its base."""
  found = {}
  for path, x in adapters.targets(config, params).items():
    matrix = adapters.adapted(config, path, x, a=None, b=None)
    dims = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
    specs = matrix.of_dims(dims, None, None)
    for name, shape in matrix.of_dims(x.shape, config.rank, 1).items():
      if name != 'magnitude' or config.use_dora:
        sharding = jax.NamedSharding(x.sharding.mesh, jax.P(*specs[name]))
        found[*path, name] = jax.ShapeDtypeStruct(
          tuple(shape), jnp.float32, sharding=sharding
        )
  return unflatten_dict(found)


def applied(
  config: ModelConfig,
  params: dict,
  folders: Sequence[epath.PathLike],
  base: str,
  is_forced: bool = False,
  tables: str = '',
  say: Callable[[str], None] = print,
) -> dict:
  """The parameters with adapters from files, one after another.

  Args:
    config: of the model.
    params: its parameters on the mesh in use; floats, or quantized.
    folders: of adapters, such as RUN/adapters/NAME.
    base: the fingerprint of the checkpoint that the parameters are from.
    is_forced: take adapters of another base.
    tables: where those of memory layers lie, as `load_params` has it.
    say: gets a sentence where several change the same rows.

  Raises:
    UserError: there is no such adapter, it is damaged, given twice, or of
      another base or model.
  """
  adapter_files.require_distinct(folders)
  of_rows = []
  for folder in folders:
    meta = adapter_files.read_meta(folder)
    adapter_files.require_base(folder, meta, base, is_forced)
    if meta['kind'] == 'rows':
      tensors, _ = adapter_files.read(folder)
      of_rows.append(row_deltas.unchecked(tensors))
      params = _with_rows(config, params, tensors, folder, tables)
    else:
      of, adapter, _ = read(folder)
      params = _beside(of, params, adapter, str(folder))
  if len(of_rows) > 1:
    for line in row_deltas.overlap_lines(of_rows):
      say(line)
  return params


def _with_rows(
  config: ModelConfig,
  params: dict,
  tensors: adapter_files.Tensors,
  where: epath.PathLike,
  tables: str,
) -> dict:
  """The parameters with differences of rows."""
  deltas = row_deltas.from_tensors(tensors, params, str(where))
  known = row_deltas.tables(params)
  assert config.memory is not None
  # Those in mapped files may look like arrays of the device.
  is_on_device = (tables or config.memory.table.store) == 'device'
  is_plain = all(isinstance(known[path], jax.Array) for path in deltas)
  if is_on_device and is_plain:
    return row_deltas.added(params, deltas, donates=True)[0]
  return row_deltas.beside(params, deltas)


def read(
  folder: epath.PathLike,
) -> tuple[AdapterConfig, dict, adapter_files.Meta]:
  """The settings and the tree of an adapter of LoRA, and all that it says.

  Raises:
    UserError: there is none, or it is damaged.
  """
  tensors, meta = adapter_files.read(folder)
  try:
    config = AdapterConfig.from_json(meta)
  except UserError as error:
    raise UserError(f'{str(folder)!r}: {error}') from error
  tree = unflatten_dict(
    {tuple(name.split('/')): jnp.asarray(x) for name, x in tensors.items()}
  )
  return config, tree, meta


def _beside(config: AdapterConfig, params: dict, adapter: dict, where: str):
  adapters.check(config, params, adapter, where)
  for path in {path[:-1] for path in adapters.leaves(adapter)}:
    matrix = adapters.at(params, path)
    require(
      not isinstance(matrix, AdaptedMatrix),
      f'{"/".join(path)} is quantized and has an adapter, so that none can be '
      f'added from {where!r}: quantize less, or give one adapter.',
    )
  adapter = jax.tree.map(
    lambda x, to: jax.device_put(x, to) if to is not None else x,
    adapter,
    _places(config, params, adapter),
    is_leaf=lambda x: x is None,
  )
  return adapters.merged(adapters.joined(config, params, adapter))


def _places(config: AdapterConfig, params: dict, adapter: dict) -> dict:
  """Where the adapter's arrays are to lie: as their matrices do."""
  found = {}
  for path in {path[:-1] for path in adapters.leaves(adapter)}:
    base, arrays = adapters.at(params, path), adapters.at(adapter, path)
    array = base.codes if isinstance(base, QuantizedMatrix) else base
    sharding = getattr(array, 'sharding', None)
    spec = None
    if isinstance(sharding, jax.NamedSharding):
      spec = sharding.spec
      if isinstance(base, QuantizedMatrix):
        spec = jax.P(*(names or None for names in base.entries))
    for name in arrays:
      to = sharding
      if spec is not None:
        matrix = adapters.adapted(config, path, base, **arrays)
        to = jax.NamedSharding(sharding.mesh, getattr(matrix.specs(spec), name))
      found[*path, name] = to
  return unflatten_dict(found)


@contextlib.contextmanager
def _mesh_of(abstract: Any):
  """The mesh of shapes with shardings, where none is in use."""
  leaves = [] if abstract is None else jax.tree.leaves(abstract)
  if not leaves or not jax.sharding.get_mesh().empty:
    yield
    return
  with jax.set_mesh(leaves[0].sharding.mesh):
    yield


def cast(matrix: AdaptedMatrix, dtype: jax.typing.DTypeLike) -> AdaptedMatrix:
  """With arrays of a type; a quantized base stays."""
  base = matrix.base
  if not isinstance(base, QuantizedMatrix):
    base = base.astype(dtype)
  return dataclasses.replace(
    matrix, base=base, a=matrix.a.astype(dtype), b=matrix.b.astype(dtype)
  )
