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
    entries = exchange.gather(rows, weight.astype(cotangent.dtype), pool)
    cotangent = exchange.all_gather_vectors(cotangent)
    entries, cotangent = exchange.all_gather_replicas((entries, cotangent))
    rows, weight, pool = entries
    num_rows = exchange.num_own_rows
    found = row_gradient(
      sort_references(rows, num_rows, exchange.first_row()),
      exchange.own_cores(weight, cotangent.shape[-1]),
      cotangent,
      pool,
      min(rows.size, num_rows),
      # Else copies of a part would drift apart.
      is_deterministic=first.is_deterministic or exchange.has_copies,
    )
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
  is_nested = bool(guest.manual_axes())
  slot, value = jax.shard_map(
    on_device,
    in_specs=(specs,),
    out_specs=(jax.P(layout.rows or None), layout.spec),
    # That copies of a part sum alike is not seen.
    check_vma=False,
    **(dict(axis_names=set(free)) if is_nested else {}),
  )(jax.tree.map(guest.lay, terms, specs))
  is_cut = bool(layout.rows + layout.columns)
  return RowGradient(slot, value, layout if is_cut else None)


def _flat(rows, weight, pool, cotangent):
  """Arrays of one dimension of tokens."""
  lead = rows.shape[:-1]

  def flat(x):
    return None if x is None else x.reshape(-1, *x.shape[len(lead) :])

  cotangent = flat(cotangent)
  if cotangent.ndim == 2:
    cotangent = cotangent[:, None]
  return flat(rows), flat(weight), flat(pool), cotangent


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
