# SPDX-License-Identifier: Apache-2.0
"""Matrices with a low-rank adapter beside them.

  y = x W + s drop(x) A B          LoRA, Hu et al., arXiv:2106.09685
  y = x m (W + s A B) / norm       DoRA, Liu et al., arXiv:2402.09353

s is alpha / r, or alpha / sqrt(r) where the rank is stabilized (rsLoRA,
arXiv:2312.03732). DoRA's norm is that of each output column of W + s A B, and
no gradient goes through it.

An `AdaptedMatrix` stands in its array's place among the parameters, or in that
of a `QuantizedMatrix`. What a product sums over is the input of the matrix, all
its other dimensions are the output: [D, N, H] of queries is a matrix [D, N H].
Matrices of experts have a first dimension besides, one adapter for each.

Letters: B batch, T positions, R rank, n adapters.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.ops.quantized_matrix import QuantizedMatrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedMatrix:
  """A parameter and what was learned beside it.

  Attributes:
    base: an array or a `QuantizedMatrix`, of two dimensions or more.
    a: [*experts, *input, R], or of several adapters [n, *input, R].
    b: [*experts, R, *output], or [n, R, *output].
    magnitude: [*output], DoRA's m; None without.
    chosen: int32 [B], which of several each sequence of a batch has; None where
      there is one.
    key: of dropout; None without.
    scale: s; of several adapters 1, with s in their `b`.
    contracted: dimensions of the base that a product sums over.
    num_experts: dimensions before them that are of experts, 0 or 1.
    dropout: share of a token's inputs that the adapter does not see.
  """

  base: Any
  a: Any
  b: Any
  magnitude: Any = None
  chosen: Any = None
  key: Any = None
  scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
  contracted: tuple[int, ...] = dataclasses.field(
    default=(0,), metadata=dict(static=True)
  )
  num_experts: int = dataclasses.field(default=0, metadata=dict(static=True))
  dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.base.shape)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def dtype(self) -> np.dtype:
    """Of the base's numbers."""
    return np.dtype(self.base.dtype)

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self))

  @property
  def rank(self) -> int:
    return self.a.shape[-1]

  def __len__(self) -> int:
    return self.shape[0]

  def of_dims(self, dims: Sequence, rank: Any, several: Any) -> dict[str, list]:
    """What is said of the dimensions of the adapter's arrays, by their names.

    Args:
      dims: letters, or mesh axes, of each dimension of the base.
      rank: of the rank.
      several: of the dimension of adapters, where there is more than one.
    """
    experts = list(dims[: self.num_experts])
    first = experts if self.chosen is None else [several]
    read = [dims[i] for i in self.contracted]
    written = [
      of
      for i, of in enumerate(dims)
      if i >= self.num_experts and i not in self.contracted
    ]
    return dict(
      a=[*first, *read, rank], b=[*first, rank, *written], magnitude=written
    )

  def letters(
    self, dims: str, rank: str = '.', several: str = '.'
  ) -> dict[str, str]:
    """`of_dims` of letters."""
    found = self.of_dims(dims, rank, several)
    return {name: ''.join(of) for name, of in found.items()}

  def gathered(
    self, dims: str, base: Any, dtype: jax.typing.DTypeLike | None = None
  ) -> 'AdaptedMatrix':
    """As it takes part in a computation, see `mesh.gather`.

    Args:
      dims: letters of the base's dimensions.
      base: what is already.
      dtype: of the adapter's arrays; None leaves their own.
    """
    found: dict[str, Any] = dict(base=base)
    for name, of in self.letters(dims).items():
      x = getattr(self, name)
      if x is not None:
        x = mesh.gather(x, of)
        is_cast = dtype is not None and name != 'magnitude'
        found[name] = x.astype(dtype) if is_cast else x
    return dataclasses.replace(self, **found)

  def astype(self, dtype: jax.typing.DTypeLike) -> 'AdaptedMatrix':
    """With base and adapter of `dtype`."""
    return dataclasses.replace(
      self,
      base=_numbers(self.base, dtype),
      a=self.a.astype(dtype),
      b=self.b.astype(dtype),
    )

  def specs(self, spec: jax.P) -> 'AdaptedMatrix':
    """How the arrays lie where the base lies as `spec` says."""
    dims = [*spec, *[None] * (self.ndim - len(spec))]
    is_quantized = isinstance(self.base, QuantizedMatrix)
    found = {
      name: jax.P(*of)
      for name, of in self.of_dims(dims, None, None).items()
      if getattr(self, name) is not None
    }
    base = self.base.specs(spec) if is_quantized else spec
    return dataclasses.replace(self, base=base, **found)

  def merged(
    self, dtype: jax.typing.DTypeLike | None = None
  ) -> Float[Array, '...']:
    """The one matrix that does the same, without dropout.

    It is made in float32, on a mesh as the base lies there.

    Args:
      dtype: of the result, by default that of the base.
    """
    if self.chosen is not None:
      raise ValueError('several adapters have no one matrix')
    matrix = self._sum()
    if self.magnitude is not None:
      matrix *= self._spread(self.magnitude / self._norm(matrix))
    return matrix.astype(self.dtype if dtype is None else dtype)

  def gain(self) -> Float[Array, '...']:
    """DoRA's m / norm of each output, [*output]."""
    matrix = jax.lax.stop_gradient(self._sum())
    return self.magnitude / self._norm(matrix)

  def norm(self) -> Float[Array, '...']:
    """Of each output's column of W + s A B, at which m begins, [*output]."""
    return self._norm(self._sum())

  def _sum(self) -> Float[Array, '...']:
    """W + s A B in float32."""
    base = _numbers(self.base, jnp.float32)
    dims = 'abcdefgh'[: self.ndim]
    of = self.letters(dims, 'R')
    a, b = (x.astype(jnp.float32) for x in (self.a, self.b))
    product = jnp.einsum(
      f'{of["a"]},{of["b"]}->{dims}', a, b, out_sharding=mesh.spec_of(base)
    )
    return base + self.scale * product

  def _norm(self, matrix) -> Float[Array, '...']:
    return jnp.sqrt(jnp.sum(jnp.square(matrix), self.contracted))

  def _spread(self, x) -> Float[Array, '...']:
    """What there is of each output, against the dimensions of the base."""
    return jnp.expand_dims(x, self.contracted)


def _numbers(base, dtype) -> Float[Array, '...']:
  if isinstance(base, QuantizedMatrix):
    return base.dequantized(dtype, _spec_of_numbers(base))
  return base.astype(dtype)


def _spec_of_numbers(base: QuantizedMatrix) -> jax.P | None:
  names = (of or None for of in base.entries)
  spec = jax.P(*names)
  return spec if any(spec) else None


def with_gain(matrix: AdaptedMatrix) -> AdaptedMatrix:
  """LoRA that does the same as DoRA, its base an array of the base's type."""
  gain = matrix.gain()
  base = _numbers(matrix.base, jnp.float32) * matrix._spread(gain)
  b = matrix.b.astype(jnp.float32) * gain[None]
  dtype = matrix.a.dtype
  return dataclasses.replace(
    matrix, base=base.astype(dtype), b=b.astype(dtype), magnitude=None
  )


def adapted_product_reference(
  letters: str, x: Float[Array, 'B T ...'], matrix: AdaptedMatrix
) -> Float[Array, 'B T ...']:
  """Each sequence's product with the matrix that it has; tests only."""
  left, right = letters.split(',')
  of, out = right.split('->')
  rows = []
  for i, row in enumerate(x):
    one = matrix
    if matrix.chosen is not None:
      which = int(matrix.chosen[i])
      one = dataclasses.replace(
        matrix, a=matrix.a[which], b=matrix.b[which], chosen=None
      )
    merged = one.merged(jnp.float32)
    rows.append(jnp.einsum(f'T{left},{of}->T{out}', row, merged))
  return jnp.stack(rows)
