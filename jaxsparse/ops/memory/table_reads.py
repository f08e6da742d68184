# SPDX-License-Identifier: Apache-2.0
"""What a pass has read of a table, and the gradient that follows by rows.

A memory layer's code sows `TableReads`; with the cotangent of what it pooled
they are the whole gradient of a table, which no array of its size is made for.

Letters: M rows, W their width, T tokens, k reads of a token, c cores, E pools.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.mesh import guest
from jaxsparse.mesh.layout import TableLayout
from jaxsparse.ops.memory.row_gradient import (
  RowGradient,
  row_gradient,
  sort_references,
)
from jaxsparse.ops.memory.table_exchange import TableExchange


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableReads:
  """The reads of all tokens in one call of a layer.

  Attributes:
    rows: of the table.
    factor: what a row was multiplied by: weights [*T, k, c] of a value bag, or
      vectors [*T, W] of products with rows.
    pool: of each read; None if there is one.
    layout: how the table lies on the mesh.
    num_rows: of the whole table, M.
    is_deterministic: whether sums are to be in a fixed order.
  """

  rows: Int[Array, '*T k']
  factor: Float[Array, '...']
  pool: Int[Array, '*T k'] | None
  layout: TableLayout = dataclasses.field(metadata=dict(static=True))
  num_rows: int = dataclasses.field(metadata=dict(static=True))
  is_deterministic: bool = dataclasses.field(metadata=dict(static=True))

  def terms(
    self, cotangent: Float[Array, '...']
  ) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Rows, weights, pools and their cotangents, which make the gradient.

    The gradient of a sum of weight * row is weight * cotangent; that of a
    product, row * vector, is cotangent * vector: the same with other names.

    Args:
      cotangent: of the pools [*T, E, W], or of the products [*T, k].
    """
    if self.factor.ndim > self.rows.ndim:
      return self.rows, self.factor, self.pool, cotangent
    return self.rows, cotangent[..., None], None, self.factor[..., None, :]


def gradient_of_reads(
  reads: Sequence[TableReads], cotangents: Sequence[jax.Array]
) -> RowGradient:
  """The gradient of one table, of all calls that have read it.

  Args:
    reads: of each call, of one table that lies in one way.
    cotangents: of what each call made of them.
  """
  first = reads[0]
  layout, free = first.layout, guest.free_axes()
  exchange = TableExchange(layout, free | guest.manual_axes(), first.num_rows)
  is_own_mesh = mesh.axis_sizes() is not None
  terms = [r.terms(c) for r, c in zip(reads, cotangents, strict=True)]

  def on_device(terms):
    parts = [_flat(*term) for term in terms]
    rows, weight, pool, cotangent = jax.tree.map(
      lambda *xs: jnp.concatenate(xs), *parts
    )
    if not is_own_mesh:
      cotangent = exchange.own_columns(cotangent)
    terms = (rows, weight, pool, cotangent)
    found = RowWindows(exchange, *terms, first.is_deterministic)(0)
    return found.slot, found.value

  if not free:
    return RowGradient(*on_device(terms))
  specs = [
    tuple(
      None if x is None else _spec(x, layout, is_own_mesh and i == 3)
      for i, x in enumerate(term)
    )
    for term in terms
  ]
  run = guest.over_free_axes(
    on_device,
    (specs,),
    (jax.P(layout.rows or None), layout.spec),
    # That copies of a part sum alike is not seen.
    check_vma=False,
  )
  slot, value = run(terms)
  is_cut = bool(layout.rows + layout.columns)
  return RowGradient(slot, value, layout if is_cut else None)


class RowWindows:
  """The gradient of a device's part of one table, some rows at a time.

  Made and called inside `jax.shard_map` where the table is cut.
  """

  def __init__(
    self,
    exchange: TableExchange,
    rows: Int[Array, '*T k'],
    weight: Float[Array, '*T k c'],
    pool: Int[Array, '*T k'] | None,
    cotangent: Float[Array, '*T G W'],
    is_deterministic: bool,
    budget: int = 0,
  ):
    """Brings to the device what concerns its rows.

    Args:
      exchange: of the table.
      rows: what `TableReads.terms` returns of this device's tokens, as are the
        next three; columns of the cotangent are those it has a part of.
      weight: of each read.
      pool: of each read, its bag.
      cotangent: of each bag.
      is_deterministic: whether sums are to be in a fixed order.
      budget: rows of a window; 0 for all that can be read.
    """
    rows, weight, pool, cotangent = _flat(rows, weight, pool, cotangent)
    entries = exchange.gather(rows, weight.astype(cotangent.dtype), pool)
    cotangent = exchange.all_gather_vectors(cotangent)
    entries, self._cotangent = exchange.all_gather_replicas(
      (entries, cotangent)
    )
    rows, weight, self._pool = entries
    # Else copies of a table would drift apart.
    self._is_deterministic = is_deterministic or exchange.has_copies
    self._weight = exchange.own_cores(weight, cotangent.shape[-1])
    num_rows = exchange.num_own_rows
    self._references = sort_references(rows, num_rows, exchange.first_row())
    self.num_distinct = self._references.num_distinct
    most = min(rows.size, num_rows)
    self.budget = min(budget or most, most)
    # Whether one window is sure to hold all rows, and how many it takes now.
    self.is_one = self.budget == most
    self.num_passes = jnp.maximum(1, -(-self.num_distinct // self.budget))

  def __call__(self, index: jax.Array | int) -> RowGradient:
    return row_gradient(
      self._references,
      self._weight,
      self._cotangent,
      self._pool,
      self.budget,
      index * self.budget,
      is_deterministic=self._is_deterministic,
    )


def _flat(*terms):
  """Arrays of one dimension of tokens; the first is `rows`."""
  num_leading = terms[0].ndim - 1
  return tuple(
    None if x is None else x.reshape(-1, *x.shape[num_leading:]) for x in terms
  )


def _spec(x: jax.Array, layout: TableLayout, has_columns: bool) -> jax.P:
  """How an array of tokens lies: along the axes whose devices have others.

  Axes over which it can't be seen to be split may split its first dimension.
  """
  free = guest.free_axes()
  seen = [
    tuple(a for a in names if a in layout.tokens) for names in guest.entries(x)
  ]
  used = {a for names in seen for a in names}
  seen[0] += tuple(a for a in layout.tokens if a in free and a not in used)
  if has_columns:
    seen[-1] = layout.alike_columns
  return jax.P(*(names or None for names in seen))
