# SPDX-License-Identifier: Apache-2.0
"""Quantized leaves in a checkpoint: plain arrays, and what they are.

The arrays are uint8, int8 and float32 leaves of a folder of their own in the
leaf's place. What else there is to know of each stands in the record.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxsparse import mesh
from jaxsparse.config.errors import UserError, require
from jaxsparse.inference.quantize import Quantization, map_leaves
from jaxsparse.nn.parameter import is_quantized
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.ops.tables import host_table, row_format
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.ops.tables.quantized_table import QuantizedTable, encoded
from jaxsparse.run import checkpoint, mapped_tables
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.stored import QUANTIZED

_TYPES = dict(matrix=QuantizedMatrix, table=QuantizedTable)
_ARRAYS = dict(matrix=('codes', 'scale'), table=('stored',))


def plain(params: Any) -> tuple[Any, dict[str, dict]]:
  """Parameters as they are saved, and what each quantized leaf is, by path.

  Scales of tables are within their rows, wherever they were.
  """
  kinds: dict[str, dict] = {}

  def on_leaf(path: tuple[str, ...], x: Any) -> Any:
    if not is_quantized(x):
      return x
    name = 'table' if isinstance(x, QuantizedTable) else 'matrix'
    if name == 'table':
      x = x.with_scales_inside()
    arrays = {key: getattr(x, key) for key in _ARRAYS[name]}
    rest = {
      field.name: getattr(x, field.name)
      for field in dataclasses.fields(x)
      if field.name not in ('scale', *arrays)
    }
    shapes = {key: list(of.shape) for key, of in arrays.items()}
    kinds['/'.join(path)] = dict(leaf=name, shapes=shapes, **rest)
    return arrays

  return map_leaves(on_leaf, params), kinds


def load_params(
  workdir: epath.PathLike,
  step: int | None = None,
  say: Callable[[str], None] | None = None,
  abstract: Any = None,
  tables: str = '',
  how: Quantization | None = None,
) -> tuple[int, Any]:
  """`checkpoint.load_params`, of quantized workdirs too.

  Args:
    workdir: see there.
    step: likewise.
    say: likewise.
    abstract: of the model before it was quantized.
    tables: where they are to lie.
    how: to quantize tables that are mapped files; the rest stays as it is.

  Raises:
    UserError: as there, the mesh can't split a leaf as it is stored, or what is
      to be quantized is so already.
  """
  kinds = (checkpoint.read_record(workdir) or {}).get(QUANTIZED)
  if not kinds:
    form = _form(how) if how and how.tables else None
    return checkpoint.load_params(
      workdir, step, say, abstract, tables, _shown, form
    )
  require(
    not how,
    f'{str(workdir)!r} is quantized already: quantize the model that it is '
    'from.',
  )
  to = abstract and map_leaves(
    lambda path, x: _abstract(path, x, kinds.get('/'.join(path))), abstract
  )
  step, params = checkpoint.load_params(workdir, step, say, to, tables, _shown)
  for path, kind in kinds.items():
    _restore(params, path.split('/'), kind, abstract)
  return step, params


def _shown(file: RowFile) -> jax.Array | HostTable:
  return host_table.shown(file.rows, file.array)


def _form(how: Quantization) -> mapped_tables.Form:
  """Of rows on file."""
  kind, clips = how.tables, how.clip_search

  def encode(rows: np.ndarray) -> np.ndarray:
    # Compiled for few lengths.
    padded = np.zeros((_power(len(rows)), rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    table = encoded(jnp.asarray(padded), kind, 1, clips)
    return np.asarray(table.stored)[: len(rows)]

  return mapped_tables.Form(
    name=f'{kind}_clipped' if clips else kind,
    num_bytes=lambda width: row_format.row_bytes(width, kind),
    encode=encode,
    table=lambda rows, width: QuantizedTable(rows, width, kind),
  )


def _power(number: int) -> int:
  """The least power of two that is no less."""
  return 1 << (number - 1).bit_length()


def _restore(params: Any, path: list[str], kind: dict, abstract: Any) -> None:
  """Puts a leaf in the place of its arrays."""
  *owners, name = path
  for owner in owners:
    params = params[owner]
    abstract = abstract and abstract[owner]
  rest = {k: v for k, v in kind.items() if k not in ('leaf', 'shapes')}
  leaf = _TYPES[kind['leaf']](**params[name], **rest)
  if isinstance(leaf, QuantizedTable):
    if abstract:
      leaf = _in_parts(leaf, abstract[name].sharding)
    if mesh.platform() == 'tpu' and not isinstance(leaf.stored, HostTable):
      leaf = leaf.with_scales_apart()
  params[name] = leaf


def _abstract(path: tuple[str, ...], x: Any, kind: dict | None) -> Any:
  """Shapes, types and shardings of a leaf's arrays."""
  if kind is None:
    return x
  arrays = {
    key: jax.ShapeDtypeStruct(
      tuple(shape), jnp.float32 if key == 'scale' else _dtype(kind)
    )
    for key, shape in kind['shapes'].items()
  }
  rest = {k: v for k, v in kind.items() if k not in ('leaf', 'shapes')}
  leaf = _TYPES[kind['leaf']](**arrays, **rest)
  if leaf.shape != x.shape:
    raise UserError(
      f'{"/".join(path)} of this model is {x.shape}, but the checkpoint has '
      f'{leaf.shape}: its config.json is of another model.'
    )
  spec, sizes = x.sharding.spec, x.sharding.mesh.shape
  if kind['leaf'] == 'table' and leaf.parts % _pieces(spec, 1, sizes):
    # Cut between parts when it is there.
    spec = jax.P(*spec[:1])
  for i, size in enumerate(leaf.units):
    if kind['leaf'] == 'matrix' and size % _pieces(spec, i, sizes):
      raise UserError(
        f'{"/".join(path)} has {size} groups of numbers along its dimension '
        f'{i}, which this mesh splits into {_pieces(spec, i, sizes)}: quantize '
        'at load (--quantize=) instead.'
      )
  placed = leaf.specs(spec)
  return {
    key: jax.ShapeDtypeStruct(
      of.shape,
      of.dtype,
      sharding=jax.NamedSharding(x.sharding.mesh, getattr(placed, key)),
    )
    for key, of in arrays.items()
  }


def _dtype(kind: dict) -> Any:
  is_int8 = (kind['leaf'], kind['kind']) == ('matrix', 'int8')
  return jnp.int8 if is_int8 else jnp.uint8


def _pieces(spec: jax.P, dim: int, sizes: Any) -> int:
  names = spec[dim] if dim < len(spec) else None
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(sizes[name] for name in names)


def _in_parts(table: QuantizedTable, where: Any) -> QuantizedTable:
  """The table with a part at least for each piece of its columns."""
  pieces = _pieces(where.spec, 1, where.mesh.shape)
  if table.parts % pieces == 0:
    return table
  parts, rows = math.lcm(table.parts, pieces), jax.P(*where.spec[:1])
  # By each device its rows.
  cut = jax.shard_map(
    lambda table: table.in_parts(parts),
    mesh=where.mesh,
    in_specs=(rows,),
    out_specs=rows,
  )(table)
  return jax.device_put(cut, where)
