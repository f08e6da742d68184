"""What attention keeps of earlier tokens: all of them, or a window's.

A linear cache holds every token's row at the index at which it was fed. A ring
has as many slots as its layer's window has positions and holds the row of index
i in slot i mod slots. Both know the position and the document of each row; rows
not yet in use are padding, of segment 0. Layers of one kind share these.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn import sparse_attention

Cache = dict[str, Any]

# Names of the rows' positions and documents, which layers of one kind share.
_ROWS = dict(
  linear=dict(positions='positions', segment_ids='segment_ids'),
  ring=dict(positions='ring_positions', segment_ids='ring_segment_ids'),
)


def is_ring(config: ModelConfig, layer: int) -> bool:
  return config.attention_kinds[layer] == 'local'


def shared_names(config: ModelConfig, layer: int) -> tuple[str, ...]:
  """What a layer extends for all layers of its kind."""
  if config.attention_kinds[layer] == 'sparse':
    # Its rows are where they are on the grid, and know their documents.
    return ('index', 'lengths')
  rows = _ROWS['ring' if is_ring(config, layer) else 'linear']
  return ('index', *rows.values())


def init_shared(config: ModelConfig, batch_size: int, length: int) -> Cache:
  """The part of a cache that all layers share, before the first token.

  `index` is the next row to be written, `lengths` [B] what it would be without
  the padding before each sequence.
  """

  def empty(length):  # Each its own buffer, as all of it may be donated.
    rows = jnp.zeros((batch_size, length), jnp.int32)
    return mesh.reshard(rows, mesh.act('BS'))

  cache = dict(index=jnp.zeros((), jnp.int32))
  if 'sparse' in config.attention_kinds:
    lengths = jnp.zeros(batch_size, jnp.int32)
    cache['lengths'] = mesh.reshard(lengths, mesh.act('B'))
  for layer in range(config.num_layers):
    num_rows = _num_rows(config, layer, length)
    for name in shared_names(config, layer):
      if name not in cache:
        cache[name] = empty(num_rows)
  return cache


def init_rows(
  config: ModelConfig, layer: int, batch_size: int, length: int
) -> Cache:
  """One layer's own part of a cache: keys and values [B, S, K, H].

  With key-wise composition also 'factors' [B, S, C, F, N] of the keys' tokens;
  a sparse layer's is a `SparseCache`.
  """
  if config.attention_kinds[layer] == 'sparse':
    return sparse_attention.init_rows(config, batch_size, length)
  num_rows = _num_rows(config, layer, length)

  def empty(dims, *shape):
    rows = jnp.zeros((batch_size, num_rows, *shape), config.dtype)
    return mesh.reshard(rows, mesh.act(dims))

  heads = (config.num_kv_heads, config.head_dim)
  cache = {name: empty('BSKH', *heads) for name in ('key', 'value')}
  dcmha = config.dcmha
  if dcmha and dcmha.num_cached:
    shape = (dcmha.num_cached, dcmha.num_factors, config.num_heads)
    cache['factors'] = empty('BS...', *shape)
  return cache


def _num_rows(config, layer, length):
  return min(config.window, length) if is_ring(config, layer) else length


def append(cache: Cache, new: Cache, has_ring: bool) -> tuple[Cache, Cache]:
  """Adds the rows of T tokens.

  Args:
    cache: a layer's own part and the shared one, in one dict. A linear one must
      have room: rows that do not fit would overwrite the last ones.
    new: rows of each of the layer's arrays, and 'positions' and 'segment_ids'.
    has_ring: whether the layer's own part is a ring.

  Returns:
    What the new tokens may read, under the names of `new`, and the cache. For a
    ring and several tokens that is the ring as it was and then the new rows, in
    the order of time: the first of them still read what the last ones replace.
  """
  rows = _ROWS['ring' if has_ring else 'linear']
  stored = {name: rows.get(name, name) for name in new}
  old = {name: cache[stored[name]] for name in new}
  index, num_new = cache['index'], new['positions'].shape[1]
  slots = old['positions'].shape[1]
  if has_ring and num_new > 1:
    roll = functools.partial(jnp.roll, axis=1)
    read = {
      name: jnp.concatenate([roll(old[name], -(index % slots)), rows], axis=1)
      for name, rows in new.items()
    }
    end = (index + num_new) % slots
    kept = {name: roll(rows[:, -slots:], end) for name, rows in read.items()}
  else:
    # One slot of a ring holds what has just left the window.
    at = index % slots if has_ring else index
    kept = read = {
      name: jax.lax.dynamic_update_slice_in_dim(old[name], rows, at, axis=1)
      for name, rows in new.items()
    }
  kept = {stored[name]: rows for name, rows in kept.items()}
  return read, cache | kept | dict(index=index + num_new)
