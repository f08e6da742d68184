# SPDX-License-Identifier: Apache-2.0
"""Value bags over a table that is split over devices, by `jax.shard_map`.

Tokens are split over the mesh axes `data` and `sparse`. The devices that hold
parts of one copy of the table form a device group; in it

  columns  every device has some columns of all rows: it pools them for the
           tokens of the whole group, and an all-to-all brings each token's
           columns together. Balanced whatever rows are popular.
  rows     every device has some rows: it pools those that it owns for the
           tokens of the group, and a reduce-scatter adds up each token's parts.
  grid     rows over `data` and columns over `sparse`: both in turn.

Behind a guest's door (`mesh.inside`) the same runs on what one device holds,
whatever axes split the table; the pools then have all columns.

Only row numbers, weights and pools cross the wire, never rows. XLA's automatic
partitioning would send all T * k of them (and has had wrong gradients here).
Columns are split over `model` as well, where tokens are replicated; the pools
stay split there, for a projection that is split over the same columns.

Letters: M rows, W value width, T tokens, k rows per token, c cores, E pools of
a token; lower-case t and w are what one device has of T and W.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.ops.memory.gathered_dot import gathered_dot
from jaxsparse.ops.memory.table_exchange import (
  TableExchange,
  owned_first,
  put_back,
)
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.ops.tables import row_delta
from jaxsparse.ops.tables.host_table import (
  Asked,
  HostTable,
  ask,
  collect,
  fetched,
)
from jaxsparse.ops.tables.quantized_table import QuantizedTable
from jaxsparse.ops.tables.row_delta import DeltaTable

# Whatever the table's scheme, every device has all rows of a delta.
_DELTA_LAYOUT = mesh.TableLayout(rows=(), columns=('model',))


def sharded_value_bag(
  table: Float[Array, 'M W'] | QuantizedTable | HostTable | DeltaTable,
  slot: Int[Array, '*T k'],
  weight: Float[Array, '*T k c'],
  pool: Int[Array, '*T k'] | None = None,
  num_pools: int = 1,
  *,
  scheme: str = 'columns',
  dtype: jax.typing.DTypeLike = jnp.float32,
  table_gradient: str = 'scatter',
  asked: Asked | None = None,
  after: Float[Array, '...'] | None = None,
) -> Float[Array, '*T {num_pools} _']:
  """`value_bag` of global arrays; with no mesh set it is that very function.

  Args:
    table: sharded as `mesh.table(scheme)`, or it will be; behind a guest's door
      this device's part.
    slot: row of each entry. Like the other arguments it is split over tokens
      along its first dimension.
    weight: c weights of each entry, one for each column block.
    pool: of each entry; None puts all into the only one.
    num_pools: pools per token.
    scheme: 'columns', 'rows' or 'grid'.
    dtype: of the result, and of weights and pools on the wire. A device sums in
      f32, but `rows` and `grid` add up the parts of several devices in `dtype`.
    table_gradient: how the table's gradient is added up, see `value_bag`.
    asked: what `ask_for_rows` of the same slots returned.
    after: an activation that comes before these rows are waited for.

  Returns:
    The bags, columns split over `model`; all columns behind a guest's door.
  """
  pool_rows = functools.partial(
    value_bag, num_pools=num_pools, table_gradient=table_gradient
  )
  tokens = jax.P(mesh.TOKENS)
  if isinstance(table, DeltaTable):
    pooled = sharded_value_bag(
      table.base,
      slot,
      weight,
      pool,
      num_pools,
      scheme=scheme,
      dtype=dtype,
      table_gradient=table_gradient,
    )
    return pooled + _delta_bag(pool_rows, table, slot, weight, pool, dtype)
  pools = jax.P(mesh.TOKENS, *[None] * (slot.ndim - 1), 'model')
  if _is_on_host(table):
    num_parts = (mesh.axis_sizes() or {}).get('model', 1)

    def own_columns(*args):
      pooled = pool_rows(*args)
      if num_parts == 1:
        return pooled
      # Of whole rows, which every device along `model` has fetched.
      width = pooled.shape[-1] // num_parts
      first = jax.lax.axis_index('model') * width
      return jax.lax.dynamic_slice_in_dim(pooled, first, width, axis=-1)

    args = (table, slot, weight, pool)
    return _on_fetched_rows(
      own_columns, pools, *args, asked=asked, after=after
    ).astype(dtype)
  exchange = _exchange(scheme, len(table))
  if exchange is None:
    return _over_flat_tokens(pool_rows)(table, slot, weight, pool).astype(dtype)

  def on_device(table, slot, weight, pool):
    num_rows, width = table.shape
    if exchange.sends:
      weight = weight.astype(dtype)
    entries = exchange.gather(slot, weight, pool)
    entries, num_valid, _ = exchange.own_rows(entries, num_rows)
    slot, weight, pool = entries
    weight = exchange.own_cores(weight, width)
    pooled = pool_rows(table, slot, weight, pool, num_valid=num_valid)
    return exchange.reduce_scatter_pools(pooled.astype(dtype))

  if mesh.inside():
    pooled = _over_flat_tokens(
      lambda *args: exchange.all_columns(on_device(*args))
    )
    return pooled(table, slot, weight, pool)
  layout = exchange.layout
  return jax.shard_map(
    _over_flat_tokens(on_device),
    in_specs=(layout.spec, tokens, tokens, tokens),
    out_specs=pools,
  )(mesh.reshard(table, layout.spec), slot, weight, pool)


def sharded_gathered_dot(
  table: Float[Array, 'M W'] | QuantizedTable | HostTable | DeltaTable,
  slot: Int[Array, '*T k'],
  vector: Float[Array, '*T _'],
  *,
  scheme: str = 'columns',
  dtype: jax.typing.DTypeLike = jnp.float32,
  table_gradient: str = 'scatter',
) -> Float[Array, '*T k']:
  """`gathered_dot` of global arrays; with no mesh set it is that very function.

  A device knows a product in part only, where it has some of the columns: what
  `columns` and `grid` send more than a bag does are the parts, [T, k].

  Args:
    table: sharded as `mesh.table(scheme)`.
    slot: row of each entry, split over tokens along the first dimension.
    vector: of each token, columns split over `model`; whole behind a guest's
      door.
    scheme: 'columns', 'rows' or 'grid'.
    dtype: of the result and on the wire, where parts are added up in it.
    table_gradient: how the table's gradient is added up, see `value_bag`.
  """

  def products(table, slot, vector, num_valid=None):
    return gathered_dot(
      table,
      slot,
      vector,
      num_valid=num_valid,
      table_gradient=table_gradient,
    )

  tokens = jax.P(mesh.TOKENS)
  if isinstance(table, DeltaTable):
    of_base = sharded_gathered_dot(
      table.base,
      slot,
      vector,
      scheme=scheme,
      dtype=dtype,
      table_gradient=table_gradient,
    )
    return of_base + _delta_products(products, table, slot, vector, dtype)
  if _is_on_host(table):
    whole = mesh.act('BT.')[:1] if mesh.axis_sizes() else None
    args = (table, slot, mesh.reshard(vector, whole), None)
    return _on_fetched_rows(products, tokens, *args).astype(dtype)
  exchange = _exchange(scheme, len(table))
  if exchange is None:
    return _over_flat_tokens(products)(table, slot, vector, None).astype(dtype)

  def on_device(table, slot, vector, _):
    entries = exchange.gather(slot, None, None)
    entries, num_valid, place = exchange.own_rows(entries, len(table))
    vector = vector[:, None].astype(dtype)
    if mesh.inside():
      vector = exchange.own_columns(vector)
    vector = exchange.all_gather_vectors(vector)[:, 0]
    parts = products(table, entries[0], vector, num_valid)
    if place is not None:
      parts = put_back(parts, place)
    return exchange.psum_products(parts.astype(dtype))

  if mesh.inside():
    return _over_flat_tokens(on_device)(table, slot, vector, None)
  layout = exchange.layout
  vectors = jax.P(mesh.TOKENS, *[None] * (slot.ndim - 2), 'model')
  return jax.shard_map(
    _over_flat_tokens(on_device),
    in_specs=(layout.spec, tokens, vectors, None),
    out_specs=tokens,
  )(mesh.reshard(table, layout.spec), slot, vector, None)


def _delta_bag(pool_rows, delta, slot, weight, pool, dtype):
  """What the reads of changed rows add to the pools."""

  def on_device(arrays, slot, weight, others):
    (rows, values), (pool, chosen) = arrays, others
    place, is_own = row_delta.find(rows, slot, chosen)
    entries = jnp.where(is_own, place, 0), weight.astype(dtype), pool
    (place, weight, pool), num_valid, _ = owned_first(entries, is_own)
    weight = (
      exchange.own_cores(weight, values.shape[-1]) if exchange else weight
    )
    pooled = pool_rows(values, place, weight, pool, num_valid=num_valid)
    return pooled.astype(dtype)

  exchange = _delta_exchange(len(delta))
  out_spec = jax.P(mesh.TOKENS, *[None] * (slot.ndim - 1), 'model')
  others = pool, delta.of_reads(slot.shape)
  tokens = jax.P(mesh.TOKENS)
  return _over_delta(on_device, delta, (tokens, tokens, tokens), out_spec)(
    slot, weight, others
  )


def _delta_products(products, delta, slot, vector, dtype):
  """What the changed rows add to the products of the reads."""

  def on_device(arrays, slot, vector, others):
    (rows, values), (_, chosen) = arrays, others
    place, is_own = row_delta.find(rows, slot, chosen)
    entries = jnp.where(is_own, place, 0), None, None
    (place, *_), num_valid, moved = owned_first(entries, is_own)
    parts = products(values, place, vector.astype(dtype), num_valid)
    parts = put_back(parts, moved).astype(dtype)
    return exchange.psum_products(parts) if exchange else parts

  exchange = _delta_exchange(len(delta))
  tokens = jax.P(mesh.TOKENS)
  vectors = jax.P(mesh.TOKENS, *[None] * (slot.ndim - 2), 'model')
  others = None, delta.of_reads(slot.shape)
  return _over_delta(on_device, delta, (tokens, vectors, tokens), tokens)(
    slot, vector, others
  )


def _delta_exchange(num_rows: int) -> TableExchange | None:
  axes = mesh.axis_sizes()
  return axes and TableExchange(_DELTA_LAYOUT, axes, num_rows)


def _over_delta(
  on_device: Callable, delta: DeltaTable, specs: tuple, out_spec: jax.P
) -> Callable:
  """`on_device` of the delta's rows and values and of each device's tokens."""
  values = delta.values.reshape(-1, delta.values.shape[-1])
  flat = _over_flat_tokens(on_device)
  if mesh.axis_sizes() is None:
    return functools.partial(flat, (delta.rows, values))
  spec = _DELTA_LAYOUT.spec
  mapped = jax.shard_map(
    flat, in_specs=((jax.P(), spec), *specs), out_specs=out_spec
  )
  return functools.partial(
    mapped,
    (mesh.reshard(delta.rows, jax.P()), mesh.reshard(values, spec)),
  )


def _is_on_host(table: jax.Array | QuantizedTable | HostTable) -> bool:
  rows = table.stored if isinstance(table, QuantizedTable) else table
  return isinstance(rows, HostTable)


def _fetched(
  table: QuantizedTable | HostTable, slot: jax.Array
) -> tuple[jax.Array | QuantizedTable, jax.Array]:
  """The distinct rows of some reads, and each read's place among them."""
  if isinstance(table, HostTable):
    return fetched(table, slot)
  rows, place = fetched(table.stored, slot)
  return dataclasses.replace(table, stored=rows), place


def ask_for_rows(table: HostTable, slot: Int[Array, '*T k']) -> Asked:
  """Begins to fetch what the tokens read, each device's by itself."""
  if mesh.axis_sizes() is None:
    return ask(table, slot)
  # Each device has its own, that of `model`, too.
  run = jax.shard_map(
    ask,
    in_specs=(jax.P(), jax.P(mesh.TOKENS)),
    out_specs=jax.P(mesh.AXES),
    check_vma=False,
  )
  return run(table, slot)


def _on_fetched_rows(
  function: Callable,
  out_spec: jax.P,
  table: QuantizedTable | HostTable,
  slot: jax.Array,
  *others: jax.Array | None,
  asked: Asked | None = None,
  after: jax.Array | None = None,
) -> jax.Array:
  """`function` of the rows that the tokens read, on the device that does."""

  def run(table, asked, after, slot, *others):
    def on_flat(table, slot, *others):
      if asked is None:
        return function(*_fetched(table, slot), *others)
      rows, place = collect(table, asked, after.reshape(-1)[0])
      return function(rows, place.reshape(slot.shape), *others)

    return _over_flat_tokens(on_flat)(table, slot, *others)

  if mesh.axis_sizes() is not None:
    tokens = jax.P(mesh.TOKENS)
    specs = (
      *(jax.P(), jax.P(mesh.AXES), tokens),
      *(tokens for _ in (slot, *others)),
    )
    # Copies of rows are the same on every device, which is not seen.
    run = jax.shard_map(
      run, in_specs=specs, out_specs=out_spec, check_vma=False
    )
  return run(table, asked, after, slot, *others)


def _exchange(scheme: str, num_rows: int) -> TableExchange | None:
  """That of a table of which an array has `num_rows`; None for a whole one."""
  axes, view = mesh.axis_sizes(), mesh.inside()
  if axes is not None:
    return TableExchange(mesh.table_layout(scheme), axes, num_rows)
  if view is None or not view.tables.rows + view.tables.columns:
    return None
  if view.is_initializing:
    return None
  num_rows *= view.pieces(view.tables.rows)
  return TableExchange(view.tables, view.sizes, num_rows)


def _over_flat_tokens(function: Callable) -> Callable:
  """`function` of arrays with one dimension of tokens, for any number."""

  def flat(table, slot, weight, pool):
    batch = slot.shape[:-1]
    slot, weight, pool = jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[len(batch) :]), (slot, weight, pool)
    )
    pooled = function(table, slot, weight, pool)
    return pooled.reshape(*batch, *pooled.shape[1:])

  return flat
