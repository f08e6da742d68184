# SPDX-License-Identifier: Apache-2.0
"""Differences of rows beside a model's tables: joined, added and taken back.

They are kept by the path of their table, such as
'block_01/memory/value_table'. `joined` puts them beside the tables, where they
leave each sequence's other reads as they are; `added` writes them into the
tables, of which `restored` makes the old ones again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config.errors import UserError, require
from jaxsparse.nn.parameter import is_quantized
from jaxsparse.ops.tables import row_delta
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.ops.tables.row_delta import Delta, DeltaTable

TABLES = ('value_table', 'pre_value_table')

# Of each table by its path.
Deltas = dict[str, Delta]
# Arrays of a file by their names: of each table 'rows' and 'values', and what
# else there is to know of its rows.
Tensors = Mapping[str, np.ndarray]


def tables(params: Any, prefix: str = '') -> dict[str, Any]:
  """The tables of memory layers, by their paths."""
  found: dict[str, Any] = {}
  for name, value in params.items():
    if isinstance(value, dict):
      found |= tables(value, f'{prefix}{name}/')
    elif name in TABLES:
      found[prefix + name] = value
  return found


def _replaced(params: Any, values: Mapping[str, Any], prefix: str = '') -> Any:
  """The parameters with other values at these paths."""
  return {
    name: _replaced(value, values, f'{prefix}{name}/')
    if isinstance(value, dict)
    else values.get(prefix + name, value)
    for name, value in params.items()
  }


def unchecked(tensors: Tensors) -> Deltas:
  """The deltas of a file whose model is not at hand."""
  found: Deltas = {}
  for name, rows in tensors.items():
    path, _, array = name.rpartition('/')
    values = _values(tensors, path)
    if array == 'rows' and values is not None:
      found[path] = rows, values
  return found


def _values(tensors: Tensors, path: str) -> np.ndarray | None:
  """Differences of a table's rows; in int8 each row has its scale beside it."""
  values, scale = (tensors.get(f'{path}/{x}') for x in ('values', 'scale'))
  if values is None or values.dtype != np.int8:
    return values
  if scale is None or scale.shape != values.shape[:1]:
    return None
  return values * scale[:, None]


def from_tensors(tensors: Tensors, params: Any, where: str) -> Deltas:
  """The deltas of a file, compared with the model that they are for.

  Args:
    tensors: of the file.
    params: of the model; shapes will do.
    where: the file is, for the sentence.

  Raises:
    UserError: a name is unknown, or rows or values are not what they must be.
  """
  known, found = tables(params), {}
  for path in sorted({name.rpartition('/')[0] for name in tensors}):
    require(
      path in known,
      f'{where!r} has {path!r}, which is no table of this model: give the '
      'model that it was trained beside.',
    )
    rows, values = tensors.get(f'{path}/rows'), _values(tensors, path)
    if rows is None or values is None:
      raise UserError(
        f"{path} in {where!r} must have 'rows' and 'values', and of int8 a "
        "'scale' of each row; it lacks one."
      )
    _check(f'{path} in {where!r}', rows, values, known[path].shape)
    found[path] = rows, values
  require(bool(found), f'{where!r} holds no rows.')
  return found


def _check(what: str, rows: np.ndarray, values: np.ndarray, shape: Any) -> None:
  num_rows, width = shape
  is_list = rows.dtype == np.int32 and rows.ndim == 1 and rows.size
  require(
    bool(is_list),
    f'the rows of {what} must be a list of int32, got {rows.dtype} of the '
    f'shape {list(rows.shape)}.',
  )
  require(
    bool((rows >= 0).all() and (rows < num_rows).all()),
    f'the rows of {what} must be of the {num_rows:,} of the table, got '
    f'{rows.min()} to {rows.max()}.',
  )
  is_after = rows[1:] > rows[:-1]
  if not is_after.all():
    i = int(np.argmin(is_after))
    raise UserError(
      f'the rows of {what} must be ascending and each once, got {rows[i]} '
      f'before {rows[i + 1]}.'
    )
  require(
    values.shape == (len(rows), width),
    f'the values of {what} must have the shape {[len(rows), width]}, got '
    f'{list(values.shape)}.',
  )


def beside(params: Any, deltas: Deltas) -> Any:
  """The parameters with differences beside their tables, which stay."""
  known = tables(params)
  joined = {
    path: DeltaTable(known[path], *map(_everywhere, delta))
    for path, delta in deltas.items()
  }
  return _replaced(params, joined)


def _everywhere(x: np.ndarray) -> jax.Array:
  """An array that every device of the mesh in use has, if there is one."""
  used = jax.sharding.get_mesh()
  if used.empty:
    return jnp.asarray(x)
  return jax.device_put(x, jax.NamedSharding(used, jax.P()))


def several_beside(
  params: Any,
  places: Sequence[Deltas | None],
  chosen: jax.Array | None = None,
  size: int = 0,
) -> Any:
  """The parameters with several models' differences beside their tables.

  Args:
    params: of the base.
    places: of each place; None for the base itself, as of the first.
    chosen: int32 [B], the place of each sequence of a batch.
    size: rows of a place, so that another of no more rows may take it and what
      is compiled stays; 0 for those of the largest.
  """
  known, joined = tables(params), {}
  for path in sorted(set().union(*filter(None, places))):
    of_place = [None if d is None else d.get(path) for d in places]
    arrays = row_delta.stacked(of_place, *known[path].shape, size)
    joined[path] = DeltaTable(known[path], *map(_everywhere, arrays), chosen)
  return _replaced(params, joined)


def summed(all_deltas: Sequence[Deltas]) -> tuple[Deltas, dict[str, int]]:
  """Several deltas as one, and how many rows of each table they share."""
  joined, overlaps = {}, {}
  for path in sorted(set().union(*all_deltas)):
    own = [deltas[path] for deltas in all_deltas if path in deltas]
    joined[path], overlaps[path] = row_delta.summed(own)
  return joined, overlaps


def overlap_lines(deltas: Sequence[Deltas]) -> list[str]:
  """How many rows several adapters change, by table."""
  _, overlaps = summed(deltas)
  lines = [
    f'{count:,} rows of {path} are changed by several; their differences are '
    'added.'
    for path, count in overlaps.items()
    if count
  ]
  return lines or ['No row is changed by several.']


def learnt(params: Any, rows: Mapping[str, np.ndarray]) -> Any:
  """The parameters with room for differences, for `with_values`.

  Args:
    params: of the base.
    rows: those that are learnt, by the path of the module of their tables;
      its values and its pre-values have the same rows.
  """
  joined = {
    path: DeltaTable(table, _everywhere(rows[owner]), None)
    for path, table in tables(params).items()
    if (owner := path.rpartition('/')[0]) in rows
  }
  return _replaced(params, joined)


def zeros(params: Any) -> Any:
  """Differences of zero of what `learnt` returned: f32, in nested dicts."""

  def below(value: Any) -> Any:
    if isinstance(value, dict):
      found = {name: below(x) for name, x in value.items()}
      return {name: x for name, x in found.items() if x}
    if not isinstance(value, DeltaTable):
      return {}
    shape = len(value.rows), value.shape[1]
    return {'values': jnp.zeros(shape, jnp.float32)}

  return below(params)


def with_values(params: Any, values: Any) -> Any:
  """What `learnt` returned with differences, in nested dicts as `zeros` has."""
  if isinstance(params, DeltaTable):
    return dataclasses.replace(params, **values)
  return params | {
    name: with_values(params[name], of) for name, of in values.items()
  }


def kept(params: Any, values: Any) -> Any:
  """Rows and values, in nested dicts, of what `with_values` takes."""
  if isinstance(params, DeltaTable):
    return dict(values, rows=params.rows)
  return {name: kept(params[name], of) for name, of in values.items()}


def restored_values(params: Any, found: Any) -> Any:
  """The values of what `kept` returned, whose rows must be those of `params`.

  Raises:
    UserError: they are others.
  """
  if isinstance(params, DeltaTable):
    require(
      np.array_equal(
        jax.device_get(params.rows), jax.device_get(found['rows'])
      ),
      'the checkpoint is of other rows than those that the workdir has in '
      'ranking/: put that folder back as it was, or give another --workdir.',
    )
    return dict(values=found['values'])
  return {name: restored_values(params[name], of) for name, of in found.items()}


def without(params: Any) -> Any:
  """The parameters without differences beside their tables."""
  return _replaced(
    params,
    {
      path: table.base
      for path, table in tables(params).items()
      if isinstance(table, DeltaTable)
    },
  )


def to_tensors(params: Any) -> dict[str, np.ndarray]:
  """What `with_values` returned, as a file has it.

  Values are of the type of their table, or f32 where that has codes.
  'old_norm' is the Euclidean norm of each row as it was.
  """
  tensors: dict[str, np.ndarray] = {}
  for path, table in tables(params).items():
    if isinstance(table, DeltaTable):
      rows = np.asarray(jax.device_get(table.rows))
      old = np.asarray(_rows_of(table.base, rows), np.float32)
      is_narrow = not is_quantized(table.base)
      values = np.asarray(jax.device_get(table.values), np.float32)
      tensors |= {
        f'{path}/rows': rows,
        f'{path}/values': values.astype(table.dtype) if is_narrow else values,
        f'{path}/old_norm': np.linalg.norm(old, axis=1),
      }
  return tensors


def _rows_of(table: Any, rows: np.ndarray) -> np.ndarray:
  if isinstance(table, HostTable):
    return table.source.take(rows)
  if isinstance(table, np.ndarray):
    return table[rows]
  return np.asarray(jax.device_get(_read(table, jnp.asarray(rows))))


@jax.jit
def _read(table, rows):
  def take(x):
    spec = None if jax.typeof(x).sharding.mesh.empty else jax.P()
    return x.at[rows].get(out_sharding=spec)

  return table.read(take) if is_quantized(table) else take(table)


def added(
  params: Any, deltas: Deltas, donates: bool = False
) -> tuple[Any, dict[str, np.ndarray]]:
  """The parameters with differences in their tables, and the rows as they were.

  Sums are rounded to the type of the table.

  Args:
    params: of the base.
    deltas: to add.
    donates: whether the tables that are changed are used no more.

  Raises:
    UserError: a table is stored in fewer bits, or does not lie on a device.
  """
  known = tables(params)
  old = {
    path: _rows_of(known[path], rows) for path, (rows, _) in deltas.items()
  }

  new = {
    path: (rows, changed(old[path], values))
    for path, (rows, values) in deltas.items()
  }
  return _written(params, new, donates), old


def changed(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Rows with their differences, rounded to their type: [t, W]."""
  new = np.asarray(rows, np.float32) + np.asarray(values, np.float32)
  return new.astype(rows.dtype)


def restored(params: Any, old: Deltas) -> Any:
  """The parameters with their rows as they were: rows and their numbers."""
  return _written(params, old)


def _written(params: Any, rows: Deltas, donates: bool = False) -> Any:
  known, written = tables(params), {}
  for path, (ids, new) in rows.items():
    table = known[path]
    require(
      isinstance(table, jax.Array),
      f'{path} must be of floats on the device for rows to be written into it: '
      'give such a workdir, or let the adapter stand beside it (--adapter=).',
    )
    write = jax.jit(_set, donate_argnums=0 if donates else ())
    written[path] = write(table, _everywhere(ids), _everywhere(new))
  return _replaced(params, written)


def _set(table, ids, new):
  lies = jax.typeof(table).sharding
  return table.at[ids].set(
    new,
    unique_indices=True,
    indices_are_sorted=True,
    out_sharding=None if lies.mesh.empty else lies,
  )


def merged(table: DeltaTable) -> jax.Array:
  """The table with its differences in it.

  Raises:
    UserError: it is stored in fewer bits, or does not lie on a device.
  """
  rows, values = jax.device_get((table.rows, table.values))
  params, _ = added(
    dict(value_table=table.base), dict(value_table=(rows, values))
  )
  return params['value_table']


def changed_share(tensors: Tensors, of_norm: float = 0.01) -> float:
  """Share of a file's rows whose change is above a share of their norm."""
  changed = total = 0
  for path, (_, values) in unchecked(tensors).items():
    norm = tensors.get(f'{path}/old_norm')
    if norm is not None:
      change = np.linalg.norm(np.asarray(values, np.float32), axis=1)
      changed += int((change > of_norm * norm).sum())
      total += len(norm)
  return changed / max(total, 1)
