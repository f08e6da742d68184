# SPDX-License-Identifier: Apache-2.0
"""Matrices in 8 or 4 bits a number, for models that are trained.

  int8  v / s rounded to -127 .. 127   s = max |v| / 127 of an output channel
  int4  v / s rounded to -7 .. 7       s = max |v| / 7 of a group
  nf4   the nearest of 16 numbers      s = max |v| of a group

A group is of numbers that follow one another along an axis that a product sums
over. Two 4-bit codes share a byte: the first half of a group is in the low
halves of its bytes, the other in the high ones, so that a matrix is split over
devices between groups. The levels of nf4, normal quantiles, are those of QLoRA
(arXiv:2305.14314, appendix E).

A matrix stands in its array's place among the parameters, and is turned into
numbers once in each call that uses it: XLA has no product of such codes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxsparse import mesh
from jaxsparse.config.errors import UserError

KINDS = ('int8', 'int4', 'nf4')

NF4_LEVELS = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
  """A parameter of two dimensions or more that is only read.

  Attributes:
    codes: int8, shaped as the matrix; or uint8, with groups and the bytes of
      one in place of dimension `axis`. Of what JAX has in a tree's place of an
      array, such as shapes and shardings, too.
    scale: f32, with 1 for each dimension that shares one.
    kind: 'int8', 'int4' or 'nf4'.
    axis: along which groups lie; 0 for int8, where there are none.
  """

  codes: Any
  scale: Any
  kind: str = dataclasses.field(metadata=dict(static=True))
  axis: int = dataclasses.field(default=0, metadata=dict(static=True))

  @property
  def group(self) -> int:
    """Numbers of a group; 0 where an output channel is one."""
    return 0 if self.kind == 'int8' else 2 * self.codes.shape[self.axis + 1]

  @property
  def shape(self) -> tuple[int, ...]:
    shape = tuple(self.codes.shape)
    if self.kind == 'int8':
      return shape
    size = shape[self.axis] * self.group
    return *shape[: self.axis], size, *shape[self.axis + 2 :]

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def dtype(self) -> np.dtype:
    """Of the numbers."""
    return np.dtype(np.float32)

  @property
  def nbytes(self) -> int:
    """As it is stored."""
    return self.codes.size + 4 * self.scale.size

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def units(self) -> tuple[int, ...]:
    """The shape in what can't be cut: numbers, along `axis` groups."""
    shape, place = tuple(self.codes.shape), self.axis + 1
    return shape if self.kind == 'int8' else shape[:place] + shape[place + 1 :]

  @property
  def entries(self) -> tuple[tuple[str, ...], ...]:
    """As `mesh.entries` has those of an array."""
    found = mesh.entries(self.codes)
    place = self.axis + 1
    return found if self.kind == 'int8' else found[:place] + found[place + 1 :]

  def of_dims(self, dims: Sequence, none: Any = None) -> tuple[list, list]:
    """What is said of each dimension, of those of codes and of scales.

    Args:
      dims: letters, or mesh axes, of each dimension of the matrix.
      none: says nothing, of a dimension that the matrix has not, or that shares
        a scale.
    """
    if self.kind == 'int8':
      of_scale = [
        none if size == 1 else of
        for of, size in zip(dims, self.scale.shape, strict=True)
      ]
      return list(dims), of_scale
    place = self.axis + 1
    dims = [*dims[:place], none, *dims[place:]]
    return dims, dims

  def specs(self, spec: jax.P) -> 'QuantizedMatrix':
    """How the arrays lie where the matrix lies as `spec` says."""
    dims = [*spec, *[None] * (self.ndim - len(spec))]
    codes, scale = (jax.P(*of) for of in self.of_dims(dims))
    return dataclasses.replace(self, codes=codes, scale=scale)

  def gathered(self, dims: str) -> 'QuantizedMatrix':
    """As `mesh.gather` has an array of dimensions with these letters."""
    codes, scale = (
      mesh.gather(x, ''.join(of))
      for x, of in zip(
        (self.codes, self.scale), self.of_dims(dims, '.'), strict=True
      )
    )
    return dataclasses.replace(self, codes=codes, scale=scale)

  def read(self, rows: Callable) -> jax.Array:
    """Numbers in f32 of what `rows(array)` reads, along the first dimension."""
    read = dataclasses.replace(
      self, codes=rows(self.codes), scale=rows(self.scale)
    )
    return read.dequantized()

  def dequantized(
    self,
    dtype: jax.typing.DTypeLike = jnp.float32,
    spec: jax.P | None = None,
  ) -> jax.Array:
    """The numbers; `spec` is their sharding where there is one."""
    if self.kind == 'int8':
      return (self.codes.astype(jnp.float32) * self.scale).astype(dtype)
    codes = jnp.concatenate(self.halves(self.codes), self.axis + 1)
    values = (codes * self.scale).astype(dtype)
    return values.reshape(self.shape, out_sharding=spec)

  def halves(
    self, codes: UInt8[Array, '...']
  ) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Of bytes the numbers in their halves, in f32 and without their scale."""
    if self.kind == 'nf4':
      return _nf4(codes & 15), _nf4(codes >> 4)
    # Of 32 bits, which a CPU shifts fastest.
    codes = codes.astype(jnp.int32)
    low, high = (codes << 28) >> 28, (codes << 24) >> 28
    return low.astype(jnp.float32), high.astype(jnp.float32)


def encoded(
  matrix: Float[Array, '...'],
  kind: str,
  contracted: tuple[int, ...],
  group: int = 64,
) -> QuantizedMatrix:
  """A matrix as it is stored; on a mesh it stays as it lies.

  Args:
    matrix: of numbers.
    kind: 'int8', 'int4' or 'nf4'; a matrix that has no groups of an even number
      along its axis, or along a device's part of it, is of int8.
    contracted: dimensions that a product sums over, groups along the last.
    group: numbers of a group, where so many divide them; else as many as do.

  Raises:
    UserError: there is no such kind.
  """
  if kind not in KINDS:
    raise UserError(
      f'kind = {kind!r} must be one of {", ".join(map(repr, KINDS))}.'
    )
  axis = contracted[-1]
  group = math.gcd(matrix.shape[axis] // _pieces(matrix, axis), group)
  if kind == 'int8' or group % 2:
    return QuantizedMatrix(*_int8(matrix, contracted), 'int8')
  codes, scale = _four_bits(matrix, kind, axis, group)
  return QuantizedMatrix(codes, scale, kind, axis)


def _pieces(x: Array, axis: int) -> int:
  """Into how many a dimension is split."""
  spec = jax.typeof(x).sharding.spec
  names = spec[axis] if axis < len(spec) else None
  names = (names,) if isinstance(names, str) else names or ()
  sizes = jax.typeof(x).sharding.mesh.shape
  return math.prod(sizes[name] for name in names)


@jax.jit(static_argnums=1)
def _int8(matrix, contracted):
  matrix = matrix.astype(jnp.float32)
  scale = jnp.abs(matrix).max(contracted, keepdims=True) / 127
  return to_codes(matrix, scale, 127).astype(jnp.int8), scale


@jax.jit(static_argnums=(1, 2, 3))
def _four_bits(matrix, kind, axis, group):
  shape, spec = matrix.shape, mesh.spec_of(matrix)
  if spec is not None:
    dims = [*spec, *[None] * (matrix.ndim - len(spec))]
    spec = jax.P(*dims[: axis + 1], None, *dims[axis + 1 :])
  shape = (*shape[:axis], shape[axis] // group, group, *shape[axis + 1 :])
  groups = matrix.astype(jnp.float32).reshape(shape, out_sharding=spec)
  largest = jnp.abs(groups).max(axis + 1, keepdims=True)
  if kind == 'int4':
    scale = largest / 7
    codes = to_codes(groups, scale, 7).astype(jnp.int8)
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
  else:
    scale = largest
    ratio = groups / jnp.where(scale == 0, 1, scale)
    codes = sum((ratio >= middle).astype(jnp.uint8) for middle in _MIDDLES)
  return packed(codes, axis + 1), scale


_MIDDLES = tuple(
  (low + high) / 2 for low, high in itertools.pairwise(NF4_LEVELS)
)


def to_codes(
  values: Float[Array, '...'], scale: Float[Array, '...'], largest: int
) -> Float[Array, '...']:
  """Numbers in units of their scale, rounded; a scale of 0 is that of zeros."""
  ratio = jnp.round(values / jnp.where(scale == 0, 1, scale))
  return jnp.clip(ratio, -largest, largest)


def packed(codes: UInt8[Array, '...'], axis: int) -> UInt8[Array, '...']:
  """Two halves of a dimension in the halves of each byte."""
  low, high = jnp.split(codes, 2, axis)
  return (low & 15) | (high << 4)


def _nf4(codes: UInt8[Array, '...']) -> Float[Array, '...']:
  return (
    jnp.array(NF4_LEVELS, jnp.float32)
    .at[codes]
    .get(mode='promise_in_bounds', out_sharding=mesh.spec_of(codes))
  )


def dequantized_reference(matrix: QuantizedMatrix) -> np.ndarray:
  """`QuantizedMatrix.dequantized`, group by group."""
  codes, scale = np.asarray(matrix.codes), np.asarray(matrix.scale)
  if matrix.kind == 'int8':
    return codes.astype(np.float32) * scale
  codes = np.moveaxis(codes, matrix.axis + 1, -1)
  scale = np.moveaxis(scale, matrix.axis + 1, -1)
  numbers = np.empty((*codes.shape[:-1], matrix.group), np.float32)
  for place in np.ndindex(codes.shape[:-1]):
    group = [int(c) & 15 for c in codes[place]]
    group += [int(c) >> 4 for c in codes[place]]
    if matrix.kind == 'int4':
      group = [code - 16 if code > 7 else code for code in group]
    else:
      group = [NF4_LEVELS[code] for code in group]
    numbers[place] = np.float32(group) * scale[place]
  return np.moveaxis(numbers, -1, matrix.axis + 1).reshape(matrix.shape)
