# SPDX-License-Identifier: Apache-2.0
"""How a table lies on a mesh: which axes split its rows, which its columns."""

import dataclasses

import jax

# The axes of our own mesh over which tokens are split.
TOKENS = ('data', 'sparse')


@dataclasses.dataclass(frozen=True)
class TableLayout:
  """How a value table [M, W] lies on the mesh.

  Columns are split over the first of their axes first: with columns over
  `model` and `sparse` the devices along `sparse` hold together one contiguous
  block of columns for each piece of `model`.
  """

  # Axes that split the rows, and those that split the columns.
  rows: tuple[str, ...]
  columns: tuple[str, ...]
  # Axes along which devices have tokens of their own; along the others, tokens
  # are alike.
  tokens: tuple[str, ...] = TOKENS

  @property
  def spec(self) -> jax.P:
    """Sharding of the table and of whatever has its shape."""
    return jax.P(self.rows or None, self.columns or None)

  @property
  def device_group(self) -> tuple[str, ...]:
    """Token axes along which devices hold parts of one table."""
    return tuple(a for a in self.rows + self.columns if a in self.tokens)

  @property
  def copies(self) -> tuple[str, ...]:
    """Token axes along which devices hold the same part."""
    return tuple(a for a in self.tokens if a not in self.device_group)

  @property
  def reduced(self) -> tuple[str, ...]:
    """Token axes that split the rows: parts of pools are added up over them."""
    return tuple(a for a in self.rows if a in self.tokens)

  @property
  def exchanged(self) -> tuple[str, ...]:
    """Token axes that split the columns: pools cross them to their tokens."""
    return tuple(a for a in self.columns if a in self.tokens)

  @property
  def alike_rows(self) -> tuple[str, ...]:
    """Axes that split the rows, of devices with the same tokens."""
    return tuple(a for a in self.rows if a not in self.tokens)

  @property
  def alike_columns(self) -> tuple[str, ...]:
    """Axes that split the columns, of devices with the same tokens."""
    return tuple(a for a in self.columns if a not in self.tokens)


TABLE_LAYOUTS = dict(
  columns=TableLayout(rows=(), columns=('model', 'sparse')),
  rows=TableLayout(rows=('sparse',), columns=('model',)),
  grid=TableLayout(rows=('data',), columns=('model', 'sparse')),
)

# Experts are rows, and the inner width F of each its columns.
EXPERT_LAYOUT = TableLayout(rows=('sparse',), columns=('model',))

WHOLE = TableLayout(rows=(), columns=(), tokens=())
