# SPDX-License-Identifier: Apache-2.0
"""A value table whose rows are stored in 8 or 4 bits a number.

It stands where the table's array stood, among the parameters and in the bags:
rows are turned into numbers after they are read, and all of them never.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.ops.tables import row_format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTable:
  """A table [M, W] that is only read.

  Attributes:
    stored: uint8 [M, S], as `row_format` has rows. Of what JAX has in a
      tree's place of an array, such as shapes and shardings, too.
    width: W of a whole row, also where a device has some of its parts.
    kind: of the rows.
    parts: of a whole row.
    scale: f32 [M, parts] if scales are apart from the rows.
  """

  stored: Any
  width: int = dataclasses.field(metadata=dict(static=True))
  kind: str = dataclasses.field(metadata=dict(static=True))
  parts: int = dataclasses.field(default=1, metadata=dict(static=True))
  scale: Any = None

  @property
  def shape(self) -> tuple[int, int]:
    """Rows, and the columns of the parts that are here."""
    return self.stored.shape[0], self.num_own_parts * self.part_width

  @property
  def part_width(self) -> int:
    return self.width // self.parts

  @property
  def num_own_parts(self) -> int:
    bytes_of = row_format.row_bytes
    if self.scale is not None:
      bytes_of = row_format.code_bytes
    return self.stored.shape[1] // bytes_of(self.part_width, self.kind)

  @property
  def units(self) -> tuple[int, int]:
    """The shape in what can't be cut: rows, and parts of them."""
    return len(self), self.num_own_parts

  @property
  def entries(self) -> tuple[tuple[str, ...], ...]:
    """As `mesh.entries` has those of an array."""
    return mesh.entries(self.stored)

  def specs(self, spec: jax.P) -> 'QuantizedTable':
    """How the arrays lie where the table lies as `spec` says."""
    scale = None if self.scale is None else spec
    return dataclasses.replace(self, stored=spec, scale=scale)

  @property
  def dtype(self) -> np.dtype:
    """Of the numbers."""
    return np.dtype(np.float32)

  @property
  def ndim(self) -> int:
    return 2

  @property
  def nbytes(self) -> int:
    """As it is stored."""
    scales = 0 if self.scale is None else 4 * self.scale.size
    return self.stored.size + scales

  def __len__(self) -> int:
    return self.stored.shape[0]

  def read(self, rows: Callable) -> jax.Array:
    """Numbers in f32 of rows [..., W], read by `rows(array)`."""
    codes, scale = self.read_codes(rows)
    values = codes.astype(jnp.float32) * scale[..., None, None]
    return values.reshape(*values.shape[:-3], self.shape[1])

  def read_codes(self, rows: Callable) -> tuple[jax.Array, jax.Array]:
    """`row_format.codes_and_scales` of rows read by `rows(array)`."""
    scale = None if self.scale is None else rows(self.scale)
    width, parts = self.shape[1], self.num_own_parts
    stored = rows(self.stored)
    return row_format.codes_and_scales(stored, self.kind, width, parts, scale)

  def dequantized(self) -> jax.Array:
    """The table [M, W] in f32."""
    return _dequantized(self)

  def with_scales_apart(self) -> 'QuantizedTable':
    """The same for a TPU, see `row_format`."""
    if self.scale is not None:
      return self
    args = self.kind, self.width, self.parts
    stored, scale = _scales_apart(self.stored, *args)
    return dataclasses.replace(self, stored=stored, scale=scale)

  def with_scales_inside(self) -> 'QuantizedTable':
    """The same for a file, see `row_format`."""
    if self.scale is None:
      return self
    args = self.kind, self.width, self.parts
    stored = _scales_inside(self.stored, self.scale, *args)
    return dataclasses.replace(self, stored=stored, scale=None)

  def in_parts(self, parts: int) -> 'QuantizedTable':
    """The same numbers, each part cut into several with the same scale."""
    if parts == self.parts:
      return self
    more, rest = divmod(parts, self.parts)
    if rest:
      raise ValueError(f'{self.parts} parts of a row cannot be made {parts}')
    stored = _recut(self.stored, self.width, self.kind, self.parts, more)
    return dataclasses.replace(self, stored=stored, parts=parts)


def encoded(
  rows: Float[Array, 'M W'],
  kind: str,
  parts: int = 1,
  clip_search: bool = False,
) -> QuantizedTable:
  """A table [M, W] of floats in rows of `kind`, see `encode_rows`."""
  stored = _encode(rows, kind, parts, clip_search)
  return QuantizedTable(stored, rows.shape[1], kind, parts)


@jax.jit
def _dequantized(table):
  return table.read(lambda x: x)


_scales_apart = jax.jit(row_format.scales_apart, static_argnums=(1, 2, 3))
_encode = jax.jit(row_format.encode_rows, static_argnums=(1, 2, 3))


@jax.jit(static_argnums=(2, 3, 4))
def _scales_inside(stored, scale, kind, width, parts):
  codes, scale = row_format.codes_and_scales(stored, kind, width, parts, scale)
  codes = codes.reshape(len(stored), parts, -1)
  return row_format.joined(codes, scale, kind)


@jax.jit(static_argnums=(1, 2, 3, 4))
def _recut(stored, width, kind, parts, more):
  codes, scale = row_format.codes_and_scales(stored, kind, width, parts)
  codes = codes.reshape(len(stored), parts * more, -1)
  return row_format.joined(codes, jnp.repeat(scale, more, axis=1), kind)
