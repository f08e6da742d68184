# SPDX-License-Identifier: Apache-2.0
"""Which way to split a value table over devices, and what each way sends.

Letters: M rows, W value width, k rows read per token, c cores, E pools per
token, d devices that share one copy of the table, b bytes per element on the
wire. Every device sends, per token of its own, in the forward pass

  I = k (4 + b c)                        row numbers and weights
  columns  (d - 1) I + (d - 1) / d  E W b
  rows     (d - 1) I + (d - 1)      E W b
  grid     (d - 1) I + (dr - 1) E W b + (dc - 1) / dc  E W b,  d = dr dc

and about as much again in the backward pass. A table of pre-values of width U,
split like the values, has its vectors sent the other way and the products back:
U in place of E W, and k (4 + b) in place of I.
"""

import dataclasses
import math

from jaxsparse import mesh
from jaxsparse.config.errors import UserError

SCHEMES = tuple(mesh.TABLE_LAYOUTS)

# Narrowest slice of a row that a backend reads at full speed: a GPU wants whole
# cache lines, and a TPU pads to its lanes, which doubles the memory of a slice
# half as wide. CPU devices stand in for the others, in tests.
_FLOOR_BYTES = {'gpu': 128}
_FLOOR_COLUMNS = {'tpu': 128}


@dataclasses.dataclass(frozen=True)
class TableUse:
  """A table and what one token reads of it."""

  # Rows M and columns W of the table.
  num_rows: int
  width: int
  # Rows k that a token reads.
  num_reads: int
  # Weights c of each row read, and pools E of each token.
  num_cores: int
  num_pools: int
  # Bytes of one element in the table, and of weights and pools on the wire.
  table_bytes: int
  wire_bytes: int
  # Columns of the table of pre-values beside it; 0: there is none.
  pre_value_width: int = 0


def bytes_per_token(scheme: str, use: TableUse, axes: dict[str, int]) -> float:
  """Bytes that a device sends for each of its tokens, forward.

  Args:
    scheme: 'columns', 'rows' or 'grid'.
    use: sizes of the table and of the reads.
    axes: length of every mesh axis.
  """
  layout = mesh.TABLE_LAYOUTS[scheme]
  over = math.prod(axes[a] for a in layout.device_group)
  over_rows = math.prod(axes[a] for a in layout.rows)
  over_columns = math.prod(axes[a] for a in layout.exchanged)
  index = use.num_reads * (4 + use.wire_bytes * use.num_cores)
  widths = use.num_pools * use.width + use.pre_value_width
  crossing = widths / axes['model'] * use.wire_bytes
  exchanged = (over_columns - 1) / over_columns
  products = 0.0
  if use.pre_value_width:
    # Row numbers are gathered again, without weights; the products, of which
    # each device has a part, are reduce-scattered.
    products = use.num_reads * (over - 1) * (4 + use.wire_bytes)
  sent = (over_rows - 1 + exchanged) * crossing
  return (over - 1) * index + sent + products


def choose_scheme(
  scheme: str, use: TableUse, axes: dict[str, int], platform: str
) -> str:
  """`scheme`, or for 'auto' the one that sends least of those that fit.

  Args:
    scheme: 'auto', 'columns', 'rows' or 'grid'.
    use: sizes of the table and of the reads.
    axes: length of every mesh axis.
    platform: 'cpu', 'gpu' or 'tpu', which has a floor for the width of slices.

  Raises:
    UserError: the scheme, or with 'auto' every scheme, cuts slices that are
      uneven or narrower than the floor.
  """
  if scheme != 'auto':
    reason = _unsupported_reason(scheme, use, axes, platform)
    if reason:
      raise UserError(f'memory.table.scheme={scheme} {reason}')
    return scheme
  reasons = {s: _unsupported_reason(s, use, axes, platform) for s in SCHEMES}
  fitting = [s for s in SCHEMES if not reasons[s]]
  if not fitting:
    raise UserError(
      f'memory.table.scheme=auto finds no way to split the value table: '
      f'columns {reasons["columns"]}'
    )
  return min(fitting, key=lambda s: bytes_per_token(s, use, axes))


def _unsupported_reason(
  scheme: str, use: TableUse, axes: dict[str, int], platform: str
) -> str:
  """What keeps the table from being split so; '' where nothing does."""
  layout = mesh.TABLE_LAYOUTS[scheme]
  over_rows = math.prod(axes[a] for a in layout.rows)
  over_columns = math.prod(axes[a] for a in layout.columns)
  if use.num_rows % over_rows:
    return (
      f'splits rows over mesh.{" x mesh.".join(layout.rows)} = {over_rows}, '
      f'which must divide the {use.num_rows} rows of the table.'
    )
  floor = max(
    _FLOOR_COLUMNS.get(platform, 1),
    math.ceil(_FLOOR_BYTES.get(platform, 1) / use.table_bytes),
  )
  widths = dict(value_dim=use.width, pre_value_dim=use.pre_value_width)
  for name, width in widths.items():
    columns = width / over_columns
    is_narrow = over_columns > 1 and columns < floor
    if width and (columns % 1 or is_narrow):
      return (
        f'splits memory.{name} = {width} over '
        f'mesh.{" x mesh.".join(layout.columns)} = {over_columns}, but a slice '
        f'must be a whole number of at least {floor} columns on this platform: '
        'lower these axes, or use rows.'
      )
  return ''


def describe_scheme(scheme: str, use: TableUse, axes: dict[str, int]) -> str:
  """One line: the scheme, a device's part of the table, bytes per token."""
  layout = mesh.TABLE_LAYOUTS[scheme]
  rows = use.num_rows // math.prod(axes[a] for a in layout.rows)
  columns = use.width // math.prod(axes[a] for a in layout.columns)
  sent = bytes_per_token(scheme, use, axes)
  return (
    f'value tables split by {scheme}: {rows:,} x {columns} of '
    f'{use.num_rows:,} x {use.width} on a device; '
    f'{sent / 1e3:.1f} KB sent per token and memory layer, forward.'
  )
