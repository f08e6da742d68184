# SPDX-License-Identifier: Apache-2.0
"""What attention keeps of earlier tokens: all of them, or a window's.

A linear cache holds every token's row at the index at which it was fed. A ring
has as many cache entries as its layer's window has positions and holds the row
of index i in entry i mod their number. Both know the position and the document
of each row; rows not yet in use are padding, of segment 0. Layers of one kind
share these.

All sequences of a batch move together, or each by itself: `index` is then [B],
new tokens come before padding, and only they stay.

Keys and values may be quantized as they are written: whatever is read, those of
the same call too, is what a later call would read. Factors of composition stay
as they are: they say how all heads mix, and are few beside the heads.

A head's rows lie next to each other, and all rows of a factor: a token that
reads them then needs no transpose, which would take a CPU ten times as long.
"""

from typing import Any

import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.attention.kinds import KINDS
from jaxsparse.ops.attention import slot_rows
from jaxsparse.ops.quantized_rows import QuantizedRows, quantize_rows

Cache = dict[str, Any]

# Where an array has its rows.
_AXIS_OF_ROWS = dict(
  key=2, value=2, key_scale=2, value_scale=2, factors=4, places=2
)
_DIMS = dict(
  key='BKSH', value='BKSH', key_scale='BKS', value_scale='BKS', factors='B...S',
  places='B.S',
)  # fmt: skip
_HEADS = ('key', 'value')

# Names of the rows' positions and documents, which layers of one kind share:
# one array [B, 2, S], so that a token writes both at once.
_PLACES = dict(linear='places', ring='ring_places')
_OF_PLACES = ('positions', 'segment_ids')


def is_ring(config: ModelConfig, layer: int) -> bool:
  return config.attention_kinds[layer] == 'local'


def shared_names(config: ModelConfig, layer: int) -> tuple[str, ...]:
  """What a layer extends for all layers of its kind."""
  if kind := KINDS.get(config.attention_kinds[layer]):
    return kind.shared
  return ('index', _PLACES['ring' if is_ring(config, layer) else 'linear'])


def init_shared(
  config: ModelConfig, batch_size: int, length: int, has_slots: bool = False
) -> Cache:
  """The part of a cache that all layers share, before the first token.

  `index` is the next row to be written, with slots that of each sequence [B];
  `lengths` [B] is what it would be without the padding before each sequence.
  """

  def empty(length):  # Each its own buffer, as all of it may be donated.
    rows = jnp.zeros((batch_size, 2, length), jnp.int32)
    return mesh.reshard(rows, mesh.act(_DIMS['places']))

  def counts():
    return mesh.reshard(jnp.zeros(batch_size, jnp.int32), mesh.act('B'))

  cache = dict(index=counts() if has_slots else jnp.zeros((), jnp.int32))
  if 'sparse' in config.attention_kinds:
    cache['lengths'] = counts()
  for layer in range(config.num_layers):
    num_rows = _num_rows(config, layer, length)
    for name in shared_names(config, layer):
      if name not in cache:
        cache[name] = empty(num_rows)
  return cache


def init_rows(
  config: ModelConfig, layer: int, batch_size: int, length: int
) -> Cache:
  """One layer's own part of a cache: keys and values [B, K, S, H].

  Quantized, these are int8, and beside them 'key_scale' and 'value_scale' f32
  [B, K, S]. With key-wise composition also 'factors' [B, C, F, N, S] of the
  keys' tokens; the kinds of `kinds` have what they need, a sparse layer a
  `SparseCache`.
  """
  if kind := KINDS.get(config.attention_kinds[layer]):
    return kind.init_rows(config, batch_size, length)
  num_rows = _num_rows(config, layer, length)

  def empty(name, *shape, dtype=config.dtype):
    rows = jnp.zeros((batch_size, *shape), dtype)
    return mesh.reshard(rows, mesh.act(_DIMS[name]))

  heads, cache = (config.num_kv_heads, num_rows), {}
  is_quantized = config.kv_cache == 'int8'
  for name in _HEADS:
    dtype = jnp.int8 if is_quantized else config.dtype
    cache[name] = empty(name, *heads, config.head_dim, dtype=dtype)
    if is_quantized:
      scale = f'{name}_scale'
      cache[scale] = empty(scale, *heads, dtype=jnp.float32)
  dcmha = config.composition(layer)
  if dcmha and dcmha.num_cached:
    shape = (dcmha.num_cached, dcmha.num_factors, config.num_heads)
    cache['factors'] = empty('factors', *shape, num_rows)
  return cache


def _num_rows(config, layer, length):
  return min(config.window, length) if is_ring(config, layer) else length


def append(cache: Cache, new: Cache, has_ring: bool) -> tuple[Cache, Cache]:
  """Adds the rows of T tokens.

  Args:
    cache: a layer's own part and the shared one, in one dict. A linear one must
      have room: rows that do not fit would overwrite the last ones.
    new: rows [B, T, ...] of each of the layer's arrays, and 'positions' and
      'segment_ids'.
    has_ring: whether the layer's own part is a ring.

  Returns:
    What the new tokens may read [B, S, ...], under the names of `new`, with
    keys and values as `QuantizedRows` if the cache's are, and the cache. For a
    ring and several tokens that is the ring as it was and then the new rows, in
    the order of time: the first of them still read what the last ones replace.
  """
  segment_ids = new['segment_ids']
  places = jnp.stack([new['positions'], segment_ids], -1)
  new = {name: x for name, x in new.items() if name not in _OF_PLACES}
  new['places'] = places
  is_quantized = 'key_scale' in cache
  if is_quantized:
    for name in _HEADS:
      codes, scale = quantize_rows(new[name])
      new = new | {name: codes, f'{name}_scale': scale}
  stored = {name: name for name in new}
  stored['places'] = _PLACES['ring' if has_ring else 'linear']
  index, num_new = cache['index'], segment_ids.shape[1]
  read, kept = {}, {}
  for name, rows in new.items():
    axis = _AXIS_OF_ROWS[name]
    old, rows = cache[stored[name]], jnp.moveaxis(rows, 1, axis)
    if index.ndim:
      seen, old = _append_to_slots(
        old, rows, index, segment_ids, name, has_ring
      )
    elif has_ring and num_new > 1:
      seen, old = slot_rows.roll_all(old, rows, index, axis)
    else:
      # One entry of a ring holds what has just left the window.
      at = index % old.shape[axis] if has_ring else index
      seen = old = slot_rows.write_all(old, rows, at, axis)
    read[name], kept[stored[name]] = jnp.moveaxis(seen, axis, 1), old
  if is_quantized:
    for name in _HEADS:
      read[name] = QuantizedRows(read[name], read.pop(f'{name}_scale'))
  places = read.pop('places')
  read |= {name: places[..., i] for i, name in enumerate(_OF_PLACES)}
  index = slot_rows.advanced(index, segment_ids)
  return read, cache | kept | dict(index=index)


def _append_to_slots(old, rows, index, segment_ids, name, has_ring):
  """What may be read, and the cache, each sequence at its own index."""
  axis, dims = _AXIS_OF_ROWS[name], _DIMS[name]
  if has_ring and segment_ids.shape[1] > 1:
    roll = mesh.per_device(
      lambda *args: slot_rows.roll_rings(*args, axis),
      (dims, dims, 'B', 'B'),
      (dims, dims),
    )
    return roll(old, rows, index, slot_rows.num_tokens(segment_ids))
  if has_ring:
    index = index % old.shape[axis]
  write = mesh.per_device(
    lambda *args: (slot_rows.write_rows(*args, axis),),
    (dims, dims, 'B'),
    (dims,),
  )
  (old,) = write(old, rows, index)
  return old, old
