# SPDX-License-Identifier: Apache-2.0
"""A trained model in 8 or 4 bits a number.

What chooses stays as it is: norms, routers, keys, cores and queries of memory
layers, and what composes heads. An error there is another row or another
expert, and no noise. Embedding and output are in 8 bits at least.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, did_you_mean, require, shown
from jaxsparse.nn import row_deltas
from jaxsparse.nn.matrices import CONTRACTED, VOCABULARY, place_of
from jaxsparse.nn.memory.tables import table_scheme
from jaxsparse.nn.parameter import is_quantized
from jaxsparse.ops import quantized_matrix
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.ops.tables import quantized_table, row_format
from jaxsparse.ops.tables.quantized_table import QuantizedTable
from jaxsparse.ops.tables.row_delta import DeltaTable

# What chooses rows stays.
_KEPT = {('memory', 'query')}
_TABLES = ('value_table', 'pre_value_table')

_GROUPS = (32, 64)

# Of the flag --quantize, wherever there is one.
QUANTIZE_HELP = (
  'quantize at load, such as weights=int8,tables=int4; group=64 and '
  'clip_search=true besides'
)

# What a part of the model is called, by the name of a module.
_PARTS = dict(
  embed='embedding and output',
  attention='attention',
  mlp='MLPs',
  moe='experts',
  memory='memory layers',
)

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
  """What is stored in how many bits."""

  # Of matrices: 'int8', 'int4', 'nf4', or '' for as they are.
  weights: str = ''
  # Of tables: 'int8', 'int4', 'float8', or '' for as they are.
  tables: str = ''
  # Numbers of int4 and nf4 matrices that share a scale: 32 or 64.
  group: int = 32
  # Whether int4 rows of tables may be cut off, see `row_format`.
  clip_search: bool = False

  def __post_init__(self):
    for name, value, kinds in (
      ('weights', self.weights, quantized_matrix.KINDS),
      ('tables', self.tables, row_format.KINDS),
    ):
      require(
        not value or value in kinds,
        f'{name} must be one of {", ".join(kinds)}, or nothing, got '
        f'{shown(value)}.',
      )
    require(
      self.group in _GROUPS, f'group must be 32 or 64, got {self.group!r}.'
    )
    require(
      not self.clip_search or self.tables == 'int4',
      f'clip_search is for tables=int4, got tables={self.tables or "nothing"}.',
    )

  def __bool__(self) -> bool:
    return bool(self.weights or self.tables)


def parse(text: str, name: str = '--quantize') -> Quantization:
  """What `--quantize=weights=int8,tables=int4` says.

  Args:
    text: behind the flag.
    name: of the flag or field that has it; '' where each part has its own.

  Raises:
    UserError: a name is unknown, or what it is to be.
  """
  names = [field.name for field in dataclasses.fields(Quantization)]
  found: dict[str, Any] = {}
  for entry in filter(None, text.split(',')):
    part, _, value = entry.partition('=')
    if part not in names:
      raise UserError(
        f'{name} has no {shown(part)}{did_you_mean(part, names)}; it is '
        'written as weights=int8,tables=int4 with group=64 or clip_search=true '
        'besides.'
      )
    found[part] = value
  try:
    return _of_texts(found)
  except UserError as error:
    raise UserError(f'{name}: {error}' if name else str(error)) from error


def _of_texts(found: dict[str, Any]) -> Quantization:
  if 'group' in found:
    group = found['group']
    found['group'] = int(group) if group.isdecimal() else group
  if 'clip_search' in found:
    clip = found['clip_search']
    require(
      clip in ('true', 'false'),
      f'clip_search must be true or false, got {shown(clip)}.',
    )
    found['clip_search'] = clip == 'true'
  return Quantization(**found)


def quantize(
  config: ModelConfig,
  params: dict,
  how: Quantization,
  encode: Callable[..., QuantizedMatrix] | None = None,
) -> dict:
  """The parameters with quantized leaves; those of other leaves are the same.

  On the mesh in use the leaves stay as they lie; a table that it splits by
  columns has a scale for each part of them.

  Args:
    config: of the model.
    params: floats, of it.
    how: what to do.
    encode: takes a leaf's path and what `quantized_matrix.encoded` takes, in
      its place.

  Raises:
    UserError: a leaf is quantized already, or a table has no such rows.
  """
  plain = quantized_matrix.encoded

  def on_leaf(path: Path, x: Any) -> Any:
    if isinstance(x, DeltaTable):
      return dataclasses.replace(x, base=on_leaf(path, x.base))
    require(
      not (is_quantized(x) or isinstance(x, AdaptedMatrix)),
      f'{"/".join(path)} is quantized already: quantize the model that it is '
      'from.',
    )
    place = place_of(path)
    if place[1] in _TABLES:
      return _table(config, x, how) if how.tables else x
    if how.weights and place in VOCABULARY:
      return plain(x, 'int8', VOCABULARY[place])
    if how.weights and place in CONTRACTED and place not in _KEPT:
      args = x, how.weights, CONTRACTED[place], how.group
      return encode(path, *args) if encode else plain(*args)
    return x

  return map_leaves(on_leaf, params)


def dequantized(params: Any) -> Any:
  """The numbers of all leaves, with the adapters that stand beside some."""

  def numbers(path: Path, x: Any) -> Any:
    if isinstance(x, AdaptedMatrix):
      return x.merged()
    if isinstance(x, DeltaTable):
      return row_deltas.merged(
        dataclasses.replace(x, base=numbers(path, x.base))
      )
    return x.dequantized() if is_quantized(x) else x

  return map_leaves(numbers, params)


def bytes_by_part(params: dict) -> dict[str, int]:
  """Bytes of the parts of a model, tables apart from what reads them."""
  sizes: dict[str, int] = {}

  def count(path: Path, x: Any) -> Any:
    part = next((_PARTS[name] for name in path if name in _PARTS), 'the rest')
    if path == ('output',):
      part = _PARTS['embed']
    if path[-1] in _TABLES:
      part = 'tables'
    sizes[part] = sizes.get(part, 0) + x.nbytes
    return x

  map_leaves(count, params)
  return sizes


def map_leaves(function: Callable[[Path, Any], Any], params: Any) -> Any:
  """`jax.tree.map` with names; a quantized or adapted leaf is one."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: function(tuple(p.key for p in path), x),
    params,
    is_leaf=lambda x: (
      is_quantized(x) or isinstance(x, AdaptedMatrix | DeltaTable)
    ),
  )


def _table(config: ModelConfig, x: Any, how: Quantization) -> QuantizedTable:
  """By each device its part, with scales apart where a TPU reads it."""
  pieces, layout = 1, None
  if mesh.axis_sizes() is not None:
    assert config.memory is not None
    memory = config.memory.for_width(config.model_dim)
    scheme = table_scheme(memory, config.dtype)
    layout = mesh.table_layout(scheme)
    pieces = num_column_pieces(layout)
  if layout is None:
    table = quantized_table.encoded(x, how.tables, 1, how.clip_search)
  else:
    row_format.row_bytes(x.shape[1], how.tables, pieces)

    def on_device(rows):
      return row_format.encode_rows(rows, how.tables, 1, how.clip_search)

    run = jax.shard_map(
      on_device, in_specs=(layout.spec,), out_specs=layout.spec
    )
    stored = jax.jit(run)(mesh.reshard(x, layout.spec))
    table = QuantizedTable(stored, x.shape[1], how.tables, pieces)
  return table.with_scales_apart() if mesh.platform() == 'tpu' else table


def num_column_pieces(layout: mesh.TableLayout) -> int:
  """Devices that a table's columns are split over on the mesh in use."""
  sizes = mesh.axis_sizes() or {}
  pieces = 1
  for axis in layout.columns:
    pieces *= sizes[axis]
  return pieces
