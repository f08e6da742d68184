# SPDX-License-Identifier: Apache-2.0
"""What devices that share a value table send each other, inside `shard_map`.

A device has t tokens of its own and m rows x w columns of the table [M, W]; the
devices of its group have together T tokens and the whole table (over `model`
tokens are the same and columns are not, so nothing is sent). In the forward
pass row numbers and weights are gathered, [t, k] to [T, k], and pools come
home, [T, E, w] to [t, E, W]; what autodiff makes of it sends the mirror image.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse import mesh
from jaxsparse.ops.shard_map_vma import argsort, match_vma

Entries = tuple[
  Int[Array, 'T k'], Float[Array, 'T k c'] | None, Int[Array, 'T k'] | None
]


@dataclasses.dataclass(frozen=True)
class TableExchange:
  """The exchange of one scheme on the mesh in use."""

  layout: mesh.TableLayout
  # Length of every mesh axis.
  axes: dict[str, int]
  # Rows of the whole table.
  num_rows: int

  def _split(self, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in axes if self.axes[a] > 1)

  @property
  def sends(self) -> bool:
    """Whether a device group is more than one device."""
    return bool(self._split(self.layout.device_group))

  @property
  def has_copies(self) -> bool:
    """Whether several devices hold the same part of the table."""
    return bool(self._split(self.layout.copies))

  def gather(
    self,
    slot: Int[Array, 't k'],
    weight: Float[Array, 't k c'] | None,
    pool: Int[Array, 't k'] | None,
  ) -> Entries:
    """The entries of the whole device group's tokens.

    Row and pool of an entry travel as one 32-bit number.
    """
    over = self._split(self.layout.device_group)
    if not over:
      return slot, weight, pool
    virtual = slot.astype(jnp.uint32)
    if pool is not None:
      virtual += pool.astype(jnp.uint32) * jnp.uint32(self.num_rows)
    virtual = jax.lax.all_gather(virtual, over, tiled=True)
    if weight is not None:
      weight = _as_matrix(jax.lax.all_gather, weight, over)
    if pool is None:
      return virtual.astype(jnp.int32), weight, None
    pool, slot = jnp.divmod(virtual, jnp.uint32(self.num_rows))
    return slot.astype(jnp.int32), weight, pool.astype(jnp.int32)

  def reduce_scatter_pools(
    self, pooled: Float[Array, 'T E w']
  ) -> Float[Array, 't E W']:
    """Adds up the parts of each pool and sends them to their tokens."""
    if over := self._split(self.layout.reduced):
      pooled = _as_matrix(jax.lax.psum_scatter, pooled, over)
    if over := self._split(self.layout.alike_rows):
      pooled = jax.lax.psum(pooled, over)
    if over := self._split(self.layout.exchanged):
      pooled = jax.lax.all_to_all(pooled, over, 0, 2, tiled=True)
    return pooled

  def all_columns(self, pooled: Float[Array, 't G w']) -> Float[Array, 't G W']:
    """Brings the columns of devices with the same tokens together.

    A sum of parts among zeros: unlike that of an all-gather, its type says that
    the result is alike on all of them.
    """
    over = self._split(self.layout.alike_columns)
    if not over:
      return pooled
    is_own = jnp.arange(self._size(over)) == jax.lax.axis_index(over)
    parts = jnp.where(is_own[None, None, :, None], pooled[:, :, None], 0)
    parts = jax.lax.psum(parts, over)
    # Exchanged columns of each part are together: to the table's order.
    first, lengths = self._alike_first()
    lengths = [lengths[i] for i in first]
    order = [2 + first.index(i) for i in range(len(first))]
    parts = parts.reshape(*parts.shape[:2], *lengths, -1)
    parts = parts.transpose(0, 1, *order, parts.ndim - 1)
    return parts.reshape(*parts.shape[:2], -1)

  def all_gather_vectors(
    self, vectors: Float[Array, 't E W']
  ) -> Float[Array, 'T E w']:
    """Brings every token's own columns to the devices that hold them."""
    if over := self._split(self.layout.exchanged):
      vectors = jax.lax.all_to_all(vectors, over, 2, 0, tiled=True)
    if over := self._split(self.layout.reduced):
      vectors = jax.lax.all_gather(vectors, over, tiled=True)
    return vectors

  def own_columns(self, x: Float[Array, 't G W']) -> Float[Array, 't G w']:
    """Own columns of what devices with the same tokens have alike."""
    over = self._split(self.layout.alike_columns)
    if not over:
      return x
    first, lengths = self._alike_first()
    parts = x.reshape(*x.shape[:2], *lengths, -1)
    parts = parts.transpose(0, 1, *(2 + i for i in first), parts.ndim - 1)
    parts = parts.reshape(*x.shape[:2], self._size(over), -1)
    return jax.lax.dynamic_index_in_dim(
      parts, jax.lax.axis_index(over), axis=2, keepdims=False
    )

  def _alike_first(self) -> tuple[list[int], list[int]]:
    """The columns' axes, alike ones first, by their places; all lengths."""
    axes = self._split(self.layout.columns)
    is_exchanged = [a in self.layout.tokens for a in axes]
    first = sorted(range(len(axes)), key=lambda i: is_exchanged[i])
    return first, [self.axes[a] for a in axes]

  def _size(self, axes: tuple[str, ...]) -> int:
    return math.prod(self.axes[a] for a in axes)

  def psum_products(self, parts: Float[Array, 'T k']) -> Float[Array, 't k']:
    """Sums of the device group's parts, each token's at its home."""
    if over := self._split(self.layout.device_group):
      parts = jax.lax.psum_scatter(parts, over, tiled=True)
    # Axes of length 1 too: the parts are marked as varying over them.
    over = self.layout.alike_rows + self.layout.alike_columns
    return jax.lax.psum(parts, over) if over else parts

  def all_gather_replicas(self, tree: Any) -> Any:
    """What all devices hold that have the same part of the table, gathered.

    Arrays of tokens; every copy gets those of all, in the same order.
    """
    over = self._split(self.layout.copies)
    if not over:
      return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, over, tiled=True), tree)

  def total(self, x: Array) -> Array:
    """The sum over the parts of one table of what each part has."""
    over = self._split(self.layout.rows + self.layout.columns)
    return jax.lax.psum(x, over) if over else x

  def total_rows(self, x: Array) -> Array:
    """`total` of what devices with the same rows have alike."""
    over = self._split(self.layout.rows)
    return jax.lax.psum(x, over) if over else x

  def pmax(self, x: Array) -> Array:
    """The largest over the parts of one table."""
    over = self._split(self.layout.rows)
    return jax.lax.pmax(x, over) if over else x

  @property
  def row_axes(self) -> tuple[str, ...]:
    """Mesh axes that split the rows."""
    return self._split(self.layout.rows)

  @property
  def column_axes(self) -> tuple[str, ...]:
    """Mesh axes that split the columns."""
    return self._split(self.layout.columns)

  @property
  def num_own_rows(self) -> int:
    """Rows of the table that this device has, or its columns of them."""
    over = self._split(self.layout.rows)
    return self.num_rows // math.prod(self.axes[a] for a in over)

  def first_row(self) -> Int[Array, ''] | int:
    """Number of this device's first row."""
    over = self._split(self.layout.rows)
    if not over:
      return 0
    num_pieces = math.prod(self.axes[a] for a in over)
    return jax.lax.axis_index(over) * (self.num_rows // num_pieces)

  def column_part(self) -> Int[Array, ''] | int:
    """How many parts of the columns are left of this device's."""
    over = self.column_axes
    return jax.lax.axis_index(over) if over else 0

  def own_cores(
    self, weight: Float[Array, 'T k c'], width: int
  ) -> Float[Array, 'T k b']:
    """Weights of the column blocks of this device's `width` columns.

    Core i weighs the i-th of c equal column blocks of all W; a slice may begin
    or end inside one, so its blocks may be narrower than a core's.
    """
    over = self.column_axes
    num_cores = weight.shape[-1]
    if not over or num_cores == 1:
      return weight
    per_core = width * math.prod(self.axes[a] for a in over) // num_cores
    block = math.gcd(width, per_core)
    core = (
      self.column_part() * width + jnp.arange(width // block) * block
    ) // per_core
    # A product with ones and zeros: the gradient of an index would add scalars
    # one by one, which is slow on GPU.
    is_own = jnp.arange(num_cores)[:, None] == core[None]
    return jnp.einsum(
      'tkc,cb->tkb',
      weight,
      is_own.astype(weight.dtype),
      precision=jax.lax.Precision.HIGHEST,
    )

  def own_rows(
    self, entries: Entries, num_rows: int
  ) -> tuple[Entries, Int[Array, 'T'] | None, Int[Array, 'T k'] | None]:
    """Entries with this device's `num_rows` rows come first in each token.

    Returns:
      The entries, rows counted from this device's first; how many of each
      token's are its own; and the places to which they have moved. Both are
      None when it has all rows.
    """
    slot, weight, pool = entries
    if not self._split(self.layout.rows):
      return entries, None, None
    local = slot - self.first_row()
    is_own = (local >= 0) & (local < num_rows)
    local = jnp.where(is_own, local, 0)
    return owned_first((local, weight, pool), is_own)


def owned_first(
  entries: Entries, is_own: Bool[Array, 'T k']
) -> tuple[Entries, Int[Array, 'T'], Int[Array, 'T k']]:
  """Each token's entries with its own ones first.

  Returns:
    The entries, how many of each token's are its own, and the places to which
    they have moved.
  """
  slot, weight, pool = entries
  order, inverse = _front(is_own)
  entries = (
    jnp.take_along_axis(slot, order, axis=1),
    None if weight is None else _permuted(weight, order, inverse),
    None if pool is None else jnp.take_along_axis(pool, order, axis=1),
  )
  return entries, is_own.sum(axis=1, dtype=jnp.int32), inverse


def _as_matrix(collective, x, axes):
  """A collective along tokens that is, or whose gradient is, a reduce-scatter.

  A TPU has these for matrices. With more dimensions it takes an all-reduce,
  twice the bytes, and a slice of it.
  """
  y = collective(x.reshape(len(x), -1), axes, tiled=True)
  return y.reshape(len(y), *x.shape[1:])


def _front(
  is_own: Bool[Array, 'T k'],
) -> tuple[Int[Array, 'T k'], Int[Array, 'T k']]:
  """The order that puts owned entries first, and its inverse."""
  order = argsort(~is_own, axis=1)
  return order, argsort(order, axis=1)


def put_back(
  parts: Float[Array, 'T k'], place: Int[Array, 'T k']
) -> Float[Array, 'T k']:
  """What was computed of entries in the order of `own_rows`, in the first."""
  order = argsort(place, axis=1)
  return _permuted(parts[..., None], place, order)[..., 0]


def _permuted(weight, order, inverse):
  """Entries in another order, with a gradient that is an order as well."""
  return _take_in_order(*match_vma(weight, order, inverse))


@jax.custom_vjp
def _take_in_order(weight, order, inverse):
  return jnp.take_along_axis(weight, order[..., None], axis=1)


_take_in_order.defvjp(
  lambda *inputs: (_take_in_order(*inputs), inputs[2]),
  lambda inverse, cotangent: (
    jnp.take_along_axis(cotangent, inverse[..., None], axis=1),
    None,
    None,
  ),
)
