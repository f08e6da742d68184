# SPDX-License-Identifier: Apache-2.0
"""Inputs with any leading dimensions, as `nn.Dense` takes them.

Layers compute on sequences, [B, T, ...]. The last leading dimension is that of
positions, and those before it number sequences: [T, D] is one sequence and [D]
one token. A batch then gives what `jax.vmap` over it gives.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.config.errors import require, shown


def require_floats(x: Any, name: str = 'x') -> None:
  require(
    jnp.issubdtype(x.dtype, jnp.floating),
    f'{name} must be of a floating-point type, got {x.dtype}.',
  )


def require_integers(x: Any, name: str) -> None:
  require(hasattr(x, 'dtype'), f'{name} must be an array, got {shown(x)}.')
  require(
    jnp.issubdtype(x.dtype, jnp.integer),
    f'{name} must be integers, got {x.dtype}.',
  )


@dataclasses.dataclass(frozen=True)
class Leading:
  """The leading dimensions of a layer's inputs.

  Where they hold no token at all, one of zeros stands in for each device, such
  that the layer declares its parameters and its results have their types. On
  our own mesh tokens are split as its rules say, and results laid as they lay.
  """

  shape: tuple[int, ...]
  # Axes that split each dimension, on our own mesh.
  split: tuple[tuple[str, ...], ...] | None = None

  @classmethod
  def of(cls, x: Any, name: str = 'x') -> 'Leading':
    """Of activations, whose last dimension is their width.

    Raises:
      UserError: they are no floating-point numbers, or a scalar.
    """
    require_floats(x, name)
    require(x.ndim > 0, f'{name} must have a last dimension, got a scalar.')
    return cls(x.shape[:-1], _split(x, x.ndim - 1))

  @classmethod
  def of_tokens(cls, tokens: Any) -> 'Leading':
    """Of tokens, which have no other dimensions.

    Raises:
      UserError: they are no integers.
    """
    require_integers(tokens, 'tokens')
    return cls(tokens.shape, _split(tokens, tokens.ndim))

  @property
  def is_empty(self) -> bool:
    return 0 in self.shape

  @property
  def _are_sequences(self) -> bool:
    return len(self.shape) == 2 and not self.is_empty

  def flat(self, x: Any, name: str = 'x') -> Any:
    """What has these leading dimensions as [B, T, ...]; None as None.

    Raises:
      UserError: it has others, or the mesh can't split the first of them.
    """
    if x is None:
      return None
    shape, rest = x.shape[: len(self.shape)], x.shape[len(self.shape) :]
    require(
      shape == self.shape,
      f'{name} must have the leading dimensions {list(self.shape)}, got '
      f'{list(x.shape)}.',
    )
    if self._are_sequences:
      is_so = _split(x, 2) in (None, (mesh.TOKENS, ()))
      return x if is_so else mesh.reshard(x, mesh.act('BT' + '.' * len(rest)))
    spec = mesh.act('BT' + '.' * len(rest))
    num_shards = mesh.num_token_shards()
    if self.is_empty:
      zeros = jnp.zeros((num_shards, 1, *rest), x.dtype)
      return mesh.reshard(zeros, spec)
    first = shape[0] if len(shape) > 1 else 1
    require(
      first % num_shards == 0,
      f'{name} must have sequences in a multiple of {num_shards}, the devices '
      f'that tokens are split over, along its first dimension; got {first}.',
    )
    length = shape[-1] if shape else 1
    if len(shape) > 1:
      x = mesh.reshard(x, mesh.act('B' + '.' * (x.ndim - 1)))
    new = (math.prod(shape[:-1]), length, *rest)
    return jax.lax.reshape(x, new, out_sharding=spec)

  def flat_at(self, index: Any, name: str) -> Any:
    """What numbers a position of each sequence, as [B]; None as None.

    Raises:
      UserError: it has another shape, or its numbers are no integers.
    """
    if index is None:
      return None
    require_integers(index, name)
    require(0 not in self.shape[-1:], f'{name} needs a position, got no token.')
    require(
      index.shape == self.shape[:-1],
      f'{name} must have the shape {list(self.shape[:-1])}, a position for '
      f'each sequence, got {list(index.shape)}.',
    )
    return jax.lax.reshape(index, (index.size,), out_sharding=mesh.act('B'))

  def of_one(self) -> 'Leading':
    """The dimensions of one position for each sequence."""
    last = (1,) if self.shape else ()
    return dataclasses.replace(self, shape=(*self.shape[:-1], *last))

  def places(
    self, positions: Any, segment_ids: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Positions and documents of the tokens, where they are not given."""
    length = self.shape[-1] if self.shape else 1
    if positions is None:
      at = jnp.arange(length, dtype=jnp.int32).reshape(self.shape[-1:])
      positions = jnp.broadcast_to(at, self.shape)
    if segment_ids is None:
      segment_ids = jnp.ones(self.shape, jnp.int32)
    return positions, segment_ids

  def restored(self, y: jax.Array) -> jax.Array:
    """What is [B, T, ...] with these leading dimensions."""
    if self._are_sequences:
      return self._laid(y)
    shape = (*self.shape, *y.shape[2:])
    if self.is_empty:
      return jnp.zeros(shape, y.dtype)
    spec = None
    if mesh.axis_sizes() is not None:
      of_y = jax.typeof(y).sharding.spec
      first = of_y.partitions[:1] if len(self.shape) > 1 else ()
      others = (None,) * (len(self.shape) - len(first))
      spec = jax.P(
        *first, *others, *of_y.partitions[2:], unreduced=of_y.unreduced
      )
    return self._laid(jax.lax.reshape(y, shape, out_sharding=spec))

  def _laid(self, y: jax.Array) -> jax.Array:
    """Laid as the tokens lay that came in."""
    n = len(self.shape)
    if self.split is None or _split(y, n) == self.split:
      return y
    of_y = jax.typeof(y).sharding.spec
    first = (names or None for names in self.split)
    spec = jax.P(*first, *of_y.partitions[n:], unreduced=of_y.unreduced)
    return mesh.reshard(y, spec)

  def metrics(self, metrics: dict) -> dict:
    """The metrics; all 0 where there is no token."""
    return jax.tree.map(jnp.zeros_like, metrics) if self.is_empty else metrics


def _split(x: Any, num_dims: int) -> tuple[tuple[str, ...], ...] | None:
  """Axes that split the first dimensions of `x`, on our own mesh."""
  if mesh.axis_sizes() is None:
    return None
  return mesh.entries(x)[:num_dims]
