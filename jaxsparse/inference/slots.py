# SPDX-License-Identifier: Apache-2.0
"""The caches of a fixed number of slots, and what is done to one of them.

A slot is one sequence of the batch. Every array of a cache with slots begins
with the batch; the functions here are for programs that have it whole on each
device: no mesh, or one of shape (1, 1, n).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.model import block_name
from jaxsparse.inference.slot_model import SlotModel
from jaxsparse.nn.attention import sparse
from jaxsparse.nn.transformer import Cache, init_cache

# Arrays of numbers with a fraction that a new tenant must find at 0.
_COUNTED = ('worth',)


def take(tree: Any, slot: jax.Array) -> Any:
  """One slot's part [1, ...] of arrays [B, ...]."""
  return jax.tree.map(
    lambda x: _locally(
      lambda x, slot: jax.lax.dynamic_slice_in_dim(x, slot, 1), x, slot
    ),
    tree,
  )


def put(tree: Any, part: Any, slot: jax.Array) -> Any:
  """Arrays [B, ...] with one slot's part replaced by `part` [1, ...]."""

  def write(x, new):
    return _locally(
      lambda x, new, slot: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0),
      x, new, slot,
    )  # fmt: skip

  return jax.tree.map(write, tree, part)


def _locally(function: Callable, x: jax.Array, *args: jax.Array) -> jax.Array:
  """`function` of what each device holds; the result lies as `x` does."""
  if jax.sharding.get_abstract_mesh().empty:
    return function(x, *args)
  specs = [jax.typeof(a).sharding.spec for a in (x, *args)]
  return jax.shard_map(function, in_specs=tuple(specs), out_specs=specs[0])(
    x, *args
  )


def emptied(part: Cache) -> Cache:
  """A slot as a new tenant takes it over.

  Documents, counts and indices are 0; what no document has is never read, so
  keys and values stay.
  """

  def empty(path, x):
    is_counted = jax.tree_util.keystr(path[-1:], simple=True) in _COUNTED
    is_kept = jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.int8
    return jnp.zeros_like(x) if is_counted or not is_kept else x

  return jax.tree.map_with_path(empty, part)


def forget(config: ModelConfig, part: Cache) -> Cache:
  """A slot of bounded history with room for its next token."""
  index, blocks = part['shared']['lengths'], dict(part['blocks'])
  for i, kind in enumerate(config.attention_kinds):
    if kind == 'sparse':
      block = blocks[block_name(i)]
      rows = sparse.forget(config, block['attention'], index)
      blocks[block_name(i)] = block | dict(attention=rows)
  return dict(shared=part['shared'], blocks=blocks)


def rows_of_bounded(config: ModelConfig) -> int:
  """Rows of a bounded history; 0 where all is kept."""
  if not (config.sparse and config.sparse.history_blocks):
    return 0
  if 'sparse' not in config.attention_kinds:
    return 0
  cache = jax.eval_shape(lambda: init_cache(config, 1, 1))
  block = block_name(config.attention_kinds.index('sparse'))
  return cache['blocks'][block]['attention']['pages'].segments.shape[1]


def row_axes(model: SlotModel, chunk: int) -> Any:
  """Where each array of a cache has rows that chunks fill one after another.

  Returns:
    A tree like the cache's of (axis, rows that a chunk has); (0, 0) for what is
    of the slot as a whole: rings, contexts, bounded histories, counts.
  """
  config = model.config
  sparse_rows = (
    config.sparse.block * config.sparse.max_blocks if (config.sparse) else 1
  )
  # Longer than any bound, for arrays that grow up to one.
  short = -(-max(config.window, sparse_rows, chunk) // chunk) * chunk

  def shapes(length):
    return jax.eval_shape(lambda: model.init_cache(1, length))

  def axis(x, longer):
    grown = np.flatnonzero(np.array(x.shape) != np.array(longer.shape))
    if not len(grown):
      return (0, 0)
    rows = x.shape[grown[0]] * chunk / short
    return (int(grown[0]), int(rows))

  return jax.tree.map(axis, shapes(short), shapes(2 * short))


def split_rows(
  model: SlotModel, chunk: int, part: Cache, begin: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
  """A slot's rows from `begin` on that one chunk has, and all else of it."""
  rows, rest = [], []
  for x, (axis, num_rows) in _with_axes(model, chunk, part):
    if not num_rows:
      rest.append(x)
      continue
    first = begin // chunk * num_rows
    rows.append(
      _locally(
        lambda x, first, n=num_rows, axis=axis: jax.lax.dynamic_slice_in_dim(
          x, first, n, axis
        ),
        x,
        first,
      )
    )
  return rows, rest


def join_rows(
  model: SlotModel,
  chunk: int,
  part: Cache,
  begin: jax.Array,
  rows: list[jax.Array],
  rest: list[jax.Array],
) -> Cache:
  """A slot with what `split_rows` took of another one."""
  rows, rest, new = iter(rows), iter(rest), []
  for x, (axis, num_rows) in _with_axes(model, chunk, part):
    if not num_rows:
      new.append(next(rest))
      continue
    first = begin // chunk * num_rows
    new.append(
      _locally(
        lambda x, y, first, axis=axis: jax.lax.dynamic_update_slice_in_dim(
          x, y, first, axis
        ),
        x,
        next(rows),
        first,
      )
    )
  return jax.tree.unflatten(jax.tree.structure(part), new)


def _with_axes(model, chunk, part):
  axes = jax.tree.leaves(
    row_axes(model, chunk), is_leaf=lambda x: type(x) is tuple
  )
  return zip(jax.tree.leaves(part), axes, strict=True)
