"""Weighted sums of rows of a value table, and their gradients.

  out[t, g, block i] = sum over j with group[t, j] = g of
      weight[t, j, i] * table[slot[t, j], block i]

Core i's weight scales the i-th of c equal blocks of columns (multi-core
scoring), and the groups are the virtual blocks of implicit value expansion,
pooled apart because each has its own projection (arXiv:2411.12364).

The obvious code, gather then einsum, writes all T * k rows to memory, and
autodiff keeps them for the backward pass. Here the gradient is written by hand
and recomputes them, and each backend gets the form that its compiler turns
into code without that buffer:
  * GPU, and CPU in f32: the sum over k is unrolled, in pieces inside a scan,
    so that gather, product and sum fuse into one loop;
  * TPU, and CPU in bf16: tokens go in chunks whose rows stay in fast memory.
Sums are in f32 (f64 for f64) throughout.

Letters: M slots, W value width, T tokens, k slots per token, c cores.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows whose loads are fused into one loop. A GPU needs many in flight; on a
# CPU the accumulator should stay in the cache and compile time counts.
_UNROLL_GPU = 28
_UNROLL_CPU = 8

# Gathered rows of one chunk of tokens.
_CHUNK_BYTES = 2**23


def value_bag(
  table: Float[Array, 'M W'],
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  group: Int[Array, 'T k'] | None = None,
  num_groups: int = 1,
) -> Float[Array, 'T {num_groups} W']:
  """Pools rows of `table`, a bag per token and group.

  Slots and groups must be in range; they are not checked, because a clamp or
  a fill costs as much as the load. Each device works on what it holds: under a
  mesh, call it in `mesh.over_tokens` with the table replicated.

  Args:
    table: rows to read.
    slot: row of each of a token's k entries; repeats count each time.
    weight: c weights of each entry, one for each of c blocks of columns.
    group: bag of each entry; None puts all into the only one.
    num_groups: number of bags per token.

  Returns:
    The bags in f32 (f64 for f64 input).
  """
  arrays = (table, slot, weight) + (() if group is None else (group,))
  table, slot, weight, *groups = _to_same_varying(*arrays)
  return _value_bag(
    table, slot, weight, groups[0] if groups else None, num_groups
  )


def value_bag_reference(
  table: Float[Array, 'M W'],
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  group: Int[Array, 'T k'] | None = None,
  num_groups: int = 1,
) -> Float[Array, 'T {num_groups} W']:
  """`value_bag` by gathering all rows and leaving the gradient to autodiff."""
  dtype = _accumulator(table, weight)
  if group is None:
    group = jnp.zeros_like(slot)
  rows_TkW = table[slot].astype(dtype)
  weight_TkW = jnp.repeat(weight, table.shape[1] // weight.shape[2], axis=2)
  one_hot_TkG = jax.nn.one_hot(group, num_groups, dtype=dtype)
  return jnp.einsum('tkw,tkw,tkg->tgw', rows_TkW, weight_TkW, one_hot_TkG)


def _accumulator(*arrays):
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _to_same_varying(*arrays):
  """Marks all as varying over the manual mesh axes over which any does.

  What is added here is summed over in the gradient, so a table that is the
  same on every device gets the gradient of all tokens.
  """

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = frozenset().union(*map(varying, arrays))

  def mark(x):
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return tuple(map(mark, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _value_bag(table, slot, weight, group, num_groups):
  return _forward(table, slot, weight, group, num_groups)


def _save(table, slot, weight, group, num_groups):
  pooled = _forward(table, slot, weight, group, num_groups)
  return pooled, (table, slot, weight, group)


def _restore(num_groups, residuals, cotangent):
  table, slot, weight, group = residuals
  d_table, d_weight = _backward(table, slot, weight, group, cotangent)
  return d_table, None, d_weight, None


_value_bag.defvjp(_save, _restore)


# Compiled as functions of their own, so that layers of one size share a trace.
@functools.partial(jax.jit, static_argnames=('num_groups',))
def _forward(table, slot, weight, group, num_groups):
  if slot.size == 0:
    shape = (slot.shape[0], num_groups, table.shape[1])
    return jnp.zeros(shape, _accumulator(table, weight))

  def unrolled(at_once):
    return lambda *args: _forward_unrolled(*args, num_groups, at_once)

  def chunked(*args):
    return _forward_chunked(*args, num_groups)

  is_narrow = table.dtype.itemsize < 4
  return jax.lax.platform_dependent(
    table, slot, weight, group,
    cpu=chunked if is_narrow else unrolled(_UNROLL_CPU),
    tpu=chunked,
    default=unrolled(_UNROLL_GPU),
  )  # fmt: skip


@jax.jit
def _backward(table, slot, weight, group, cotangent):
  if slot.size == 0:
    return jnp.zeros_like(table), jnp.zeros_like(weight)
  return jax.lax.platform_dependent(
    table, slot, weight, group, cotangent,
    cpu=_backward_chunked, tpu=_backward_chunked, default=_backward_whole,
  )  # fmt: skip


def _with_groups(weight, group, num_groups):
  """Weights [..., G, c]: an entry's own in its group, zero in the others."""
  if group is None:
    return weight[..., None, :]
  is_own = jax.nn.one_hot(group, num_groups, dtype=bool)
  return jnp.where(is_own[..., None], weight[..., None, :], 0)


def _split_columns(table, weight):
  num_rows, width = table.shape
  num_cores = weight.shape[-1]
  return table.reshape(num_rows, num_cores, width // num_cores)


def _rows(table, slot):
  return table.at[slot].get(mode='promise_in_bounds')


def _forward_unrolled(table, slot, weight, group, num_groups, at_once):
  dtype = _accumulator(table, weight)
  table_Mcw = _split_columns(table, weight)
  num_tokens, num_entries = slot.shape
  num_pieces = math.ceil(num_entries / at_once)
  at_once = math.ceil(num_entries / num_pieces)

  def pieces(x):  # [T, k, ...] -> [pieces, at_once, T, ...]
    x = _pad(x, num_pieces * at_once, axis=1)
    x = x.reshape(num_tokens, num_pieces, at_once, *x.shape[2:])
    return jnp.moveaxis(x, 0, 2)

  def add_piece(pooled_TGcw, piece):
    slot, weight, group = piece
    for j in range(at_once):
      rows_Tcw = _rows(table_Mcw, slot[j]).astype(dtype)
      weight_TGc = _with_groups(
        weight[j].astype(dtype), None if group is None else group[j], num_groups
      )
      pooled_TGcw += weight_TGc[..., None] * rows_Tcw[:, None]
    return pooled_TGcw, None

  shape = (num_tokens, num_groups, *table_Mcw.shape[1:])
  (pooled_TGcw, *_) = _to_same_varying(jnp.zeros(shape, dtype), table, slot)
  xs = jax.tree.map(pieces, (slot, weight, group))
  if num_pieces == 1:
    pooled_TGcw, _ = add_piece(pooled_TGcw, jax.tree.map(lambda x: x[0], xs))
  else:
    pooled_TGcw, _ = jax.lax.scan(add_piece, pooled_TGcw, xs)
  return pooled_TGcw.reshape(num_tokens, num_groups, -1)


def _forward_chunked(table, slot, weight, group, num_groups):
  dtype = _accumulator(table, weight)

  def pool(chunk):
    slot, weight, group = chunk
    rows_tkcw = _rows(_split_columns(table, weight), slot)
    weight_tkGc = _with_groups(weight.astype(dtype), group, num_groups)
    return jnp.einsum(
      'tkgc,tkcw->tgcw',
      weight_tkGc,
      rows_tkcw.astype(dtype),
      precision=jax.lax.Precision.HIGHEST,
    )

  chunks = _token_chunks(table, slot, (slot, weight, group))
  pooled = jax.lax.map(pool, chunks)
  return pooled.reshape(-1, num_groups, table.shape[1])[: slot.shape[0]]


def _pad(x, size, axis):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, padding) if size > x.shape[axis] else x


def _token_chunks(table, slot, arrays):
  """Splits dimension T into [chunks, t]; padding reads row 0 and weighs 0."""
  num_tokens, num_entries = slot.shape
  token_bytes = num_entries * table.shape[1] * table.dtype.itemsize
  size = max(1, min(num_tokens, _CHUNK_BYTES // token_bytes))
  num_chunks = math.ceil(num_tokens / size)
  size = math.ceil(num_tokens / num_chunks)

  def chunked(x):
    x = _pad(x, num_chunks * size, axis=0)
    return x.reshape(num_chunks, size, *x.shape[1:])

  return jax.tree.map(chunked, arrays)


def _backward_whole(table, slot, weight, group, cotangent):
  """Both gradients at once, where gathers fuse into what consumes them."""
  d_table = _zero_gradient(table, weight, slot)
  d_table, d_weight = _add_gradient(
    table, d_table, (slot, weight, group, cotangent)
  )
  return d_table.astype(table.dtype), d_weight.astype(weight.dtype)


def _backward_chunked(table, slot, weight, group, cotangent):
  d_table = _zero_gradient(table, weight, slot)
  chunks = _token_chunks(table, slot, (slot, weight, group, cotangent))
  d_table, d_weight = jax.lax.scan(
    functools.partial(_add_gradient, table), d_table, chunks
  )
  d_weight = d_weight.reshape(-1, *weight.shape[1:])[: weight.shape[0]]
  return d_table.astype(table.dtype), d_weight.astype(weight.dtype)


def _zero_gradient(table, weight, slot):
  zeros = jnp.zeros(table.shape, _accumulator(table, weight))
  return _to_same_varying(zeros, table, slot)[0]


def _add_gradient(table, d_table, chunk):
  """Adds a chunk's outer products to `d_table`; returns its weights' gradient.

  The scatter adds whole rows in f32: scalar and bf16 updates would each cost
  an order of magnitude on some backend.
  """
  slot, weight, group, cotangent_tGW = chunk
  dtype = d_table.dtype
  cotangent_tGW = cotangent_tGW.astype(dtype)
  if group is None:
    pooled_tkW = cotangent_tGW
  else:
    pooled_tkW = jax.vmap(_rows)(cotangent_tGW, group)
  num_cores = weight.shape[-1]

  def split(x):  # [t, k, W] -> [t, k, c, w]; k is 1 in the absence of groups
    return x.reshape(*x.shape[:2], num_cores, -1)

  pooled_tkcw = split(pooled_tkW)
  rows_tkcw = split(_rows(table, slot).astype(dtype))
  d_weight = (rows_tkcw * pooled_tkcw).sum(-1)
  update = weight.astype(dtype)[..., None] * pooled_tkcw
  d_table = d_table.at[slot.reshape(-1)].add(
    update.reshape(-1, table.shape[1]), mode='promise_in_bounds'
  )
  return d_table, d_weight
