# SPDX-License-Identifier: Apache-2.0
"""Dense attention: grouped heads, documents, windows, composed heads.

Two matmuls and a softmax, written out: `jax.nn.dot_product_attention` does the
same on every platform unless asked for cuDNN, which takes no float32, and its
bfloat16 matmul has no CPU implementation at some shapes (JAX 0.10.2).

The softmax is that of Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; heads are
grouped as in GQA (Ainslie et al. 2023, arXiv:2305.13245), and may be composed
before and after the softmax (`compose`).

A query sees its document's keys up to its own position. With `reach` it sees
keys up to another one, which makes a prefix whose positions all see each other
(`spans`); without causality it sees all of its document. Then queries and keys
may be of two streams, in which documents of one number belong together.

With `chunk` the queries come in chunks, one after another, and the backward
pass makes each chunk's scores again: memory for scores then grows with the
number of keys, not with its square, and with a window not even with that.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H head
width.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse import mesh
from jaxsparse.config.errors import require
from jaxsparse.ops.attention import cpu, libraries
from jaxsparse.ops.attention.compose import HeadMix, compose, compose_reference
from jaxsparse.ops.attention.products import scores, sums
from jaxsparse.ops.quantized_rows import QuantizedRows
from jaxsparse.ops.softmax import softmax

# Arrays of the queries or of the keys: their heads, positions and segments, and
# factors of the heads' composition.
_Side = dict[str, jax.Array | QuantizedRows | None]
_Mixes = dict[str, HeadMix]

# Number of stages into which chunks are sorted by how many keys they see: with
# 4 stages, a quarter more scores are made than are seen.
_STAGES = 4


class _Sight(NamedTuple):
  """What a query sees besides its document's bounds."""

  window: int
  is_causal: bool


def document_mask(
  query_positions: Int[Array, 'B T'],
  key_positions: Int[Array, 'B S'],
  query_segments: Int[Array, 'B T'],
  key_segments: Int[Array, 'B S'],
  window: int = 0,
  *,
  reach: Int[Array, 'B T'] | None = None,
  is_causal: bool = True,
) -> Bool[Array, 'B T S']:
  """True where a query sees a key: same document, not later, no padding.

  With a window only the last `window` positions, the query's own among them,
  and as many of those behind it as are seen at all. Segment 0 is padding: it
  sees nothing and is not seen. `reach` is the last position that each query
  sees, by default its own; without causality there is none.
  """
  is_same = query_segments[:, :, None] == key_segments[:, None, :]
  is_seen = is_same & (key_segments > 0)[:, None, :]
  distance = query_positions[:, :, None] - key_positions[:, None, :]
  if is_causal and reach is None:
    is_seen &= distance >= 0
    return is_seen & (distance < window) if window else is_seen
  if reach is not None:
    is_seen &= key_positions[:, None, :] <= reach[:, :, None]
  return is_seen & (jnp.abs(distance) < window) if window else is_seen


def attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'] | QuantizedRows,
  value: Float[Array, 'B S K H'] | QuantizedRows,
  query_positions: Int[Array, 'B T'],
  key_positions: Int[Array, 'B S'],
  query_segments: Int[Array, 'B T'],
  key_segments: Int[Array, 'B S'],
  *,
  window: int = 0,
  reach: Int[Array, 'B T'] | None = None,
  is_causal: bool = True,
  pre: HeadMix | None = None,
  post: HeadMix | None = None,
  chunk: int = 0,
  implementation: str = 'xla',
) -> Float[Array, 'B T N H']:
  """Softmax attention within documents, over keys at positions up to one's own.

  Args:
    query: N heads; head n reads key/value head n // (N / K).
    key: K heads, already rotated; of a cache also quantized, as are values.
    value: as `key`.
    query_positions: position of each query in its document.
    key_positions: position of each key in its document.
    query_segments: document of each query; 0 for padding.
    key_segments: document of each key; 0 for padding and for unused cache.
    window: positions that a query sees, its own among them; 0 for all. With
      `chunk`, keys must be in the order of time, and the last T of them be the
      queries'. Where later keys are seen it bounds their distance, too.
    reach: the last position that each query sees; None for its own.
    is_causal: False for all positions, before and behind; then there is no
      `reach`.
    pre: composes heads before the softmax and the mask.
    post: composes heads after the softmax.
    chunk: queries at once; 0 for all.
    implementation: 'xla' as above, or a kernel, see `libraries.choose`; then
      the keys' rows must be the queries', in the order of time, or there is
      one query, which gets no gradient. A query of another stream than the
      keys' wants 'xla'.

  Returns:
    Sums of the values by the softmax, in float32, or by what `post` makes of
    it; zero for queries that see no key, such as padding.

  Raises:
    UserError: `implementation` is unknown or can't run here.
  """
  require(
    is_causal or reach is None,
    'reach is of causal attention, but is_causal is False: give one of them.',
  )
  mixes = {n: m for n, m in dict(pre=pre, post=post).items() if m}
  call = libraries.Call(
    length=query.shape[1],
    num_keys=key.shape[1],
    num_heads=query.shape[2],
    num_kv_heads=key.shape[2],
    width=query.shape[3],
    dtype=query.dtype,
    window=window,
    is_composed=bool(mixes),
    is_quantized=isinstance(key, QuantizedRows),
    is_causal=is_causal,
    has_reach=reach is not None,
  )
  library = libraries.choose(implementation, call)
  if library != 'xla' and call.is_decoding:
    return libraries.decoding_attention(
      query, key, value, query_positions, key_positions, query_segments,
      key_segments, window,
    )  # fmt: skip
  if library != 'xla':
    return libraries.library_attention(
      library, query, key, value, query_segments, window, is_causal
    )
  letter = _head_letter(mixes)

  def placed(x: jax.Array | QuantizedRows | None, dims: str):
    if isinstance(x, QuantizedRows):
      return QuantizedRows(placed(x.codes, dims), placed(x.scale, dims[:-1]))
    return None if x is None else mesh.reshard(x, mesh.act(dims))

  queries = dict(
    heads=placed(query, f'BT{letter}H'),
    positions=query_positions,
    segments=query_segments,
    reach=reach,
  )
  keys = dict(
    key=placed(key, f'BS{letter}H'),
    value=placed(value, f'BS{letter}H'),
    positions=key_positions,
    segments=key_segments,
  )
  for name, mix in mixes.items():
    queries[name] = placed(mix.query, f'BT.{letter}')
    keys[name] = placed(mix.key, f'BS.{letter}')
    base = placed(mix.base, f'{letter}..')
    mixes[name] = dataclasses.replace(mix, base=base)
  length = query.shape[1]
  # As for kernels: the keys' rows are the queries', in the order of time.
  has_own_keys = (
    implementation == 'auto' and key.shape[1] == length and not mixes
  )
  sight = _Sight(window, is_causal)
  if chunk and length > chunk:
    out = _in_chunks(queries, keys, mixes, sight, chunk)
  elif (
    has_own_keys
    and _sees_nothing_later(queries, sight)
    and cpu.leaves_out_later_keys(length)
  ):
    out = _in_halves(queries, keys, sight)
  else:
    out = _attend(queries, keys, mixes, sight)
  return mesh.reshard(out, mesh.act('BTNH'))


def _sees_nothing_later(queries: _Side, sight: _Sight):
  return sight.is_causal and queries['reach'] is None


def _head_letter(mixes: _Mixes):
  """Heads are split over the mesh unless those of several devices meet.

  An axis of length 1 would go to the heads of a group, which are contracted.
  """
  _, num_shards = mesh.shards('N')
  is_split = num_shards > 1 and not any(
    m.num_groups % num_shards for m in mixes.values()
  )
  return 'N' if is_split else '.'


def _in_halves(queries: _Side, keys: _Side, sight: _Sight):
  """The first half of the rows, which see no later ones, and the second."""
  half = queries['positions'].shape[1] // 2
  first, second = (
    jax.tree.map(lambda x, s=s: x[:, s], queries)
    for s in (slice(half), slice(half, None))
  )
  early = jax.tree.map(lambda x: x[:, :half], keys)
  parts = _attend(first, early, {}, sight), _attend(second, keys, {}, sight)
  return jnp.concatenate(parts, axis=1)


def _in_chunks(
  queries: _Side, keys: _Side, mixes: _Mixes, sight: _Sight, chunk: int
):
  batch, length = queries['positions'].shape
  num_chunks = -(-length // chunk)
  padding = num_chunks * chunk - length
  parts = jax.tree.map(
    lambda x: _pad(x, 0, padding).reshape(
      batch, num_chunks, chunk, *x.shape[2:]
    ),
    queries,
  )
  parts = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts)
  is_near = sight.window and _sees_nothing_later(queries, sight)
  run = _over_window if is_near else _over_all
  out = run(parts, keys, mixes, sight, keys['positions'].shape[1] - length)
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(batch, -1, *out.shape[3:])[:, :length]


def _over_window(
  parts: _Side, keys: _Side, mixes: _Mixes, sight: _Sight, first: int
):
  """Each chunk with the keys that its queries can reach."""
  num_chunks, _, chunk = parts['positions'].shape
  before = sight.window - 1
  reach = before + chunk
  missing = first + num_chunks * chunk - keys['positions'].shape[1]
  keys = jax.tree.map(lambda x: _pad(x, before, missing), keys)

  @jax.checkpoint
  def attend(part: tuple[jax.Array, _Side]):
    index, queries = part
    near = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(
        x, first + index * chunk, reach, axis=1
      ),
      keys,
    )
    return _attend(queries, near, mixes, sight)

  return jax.lax.map(attend, (jnp.arange(num_chunks), parts))


def _over_all(
  parts: _Side, keys: _Side, mixes: _Mixes, sight: _Sight, first: int
):
  """Each chunk with all keys, or in stages with those that are not later."""
  num_chunks, _, chunk = parts['positions'].shape
  # Where keys are a cache, its end is not the queries'.
  sees_all = first or not _sees_nothing_later(parts, sight)
  num_stages = 1 if sees_all else min(_STAGES, num_chunks)
  ends = [num_chunks * (i + 1) // num_stages for i in range(num_stages)]
  turns_over = any(mix.key is not None for mix in mixes.values())
  outs, begin = [], 0
  for end in ends:
    stage = jax.tree.map(lambda x, b=begin, e=end: x[b:e], parts)
    last = keys['positions'].shape[1] if end == num_chunks else end * chunk
    more = cpu.pad_off_cache_alias(last) if turns_over else 0
    past = jax.tree.map(lambda x, e=last, m=more: _pad(x[:, :e], 0, m), keys)
    attend = jax.checkpoint(
      lambda queries, past=past: _attend(queries, past, mixes, sight)
    )
    outs.append(jax.lax.map(attend, stage))
    begin = end
  return jnp.concatenate(outs)


def _pad(x: jax.Array, before: int, after: int):
  widths = [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths)


def _attend(queries: _Side, keys: _Side, mixes: _Mixes, sight: _Sight):
  """All queries with all keys at once."""
  query, key, value = queries['heads'], keys['key'], keys['value']
  B, T, N, H = query.shape
  K = key.shape[2]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  letter = _head_letter(mixes)
  # With one key/value head `model` (of length 1) would go to its group.
  split = mesh.act(f'BT{letter}GH')
  query = query.reshape(B, T, K, N // K, H, out_sharding=split)
  scale = H**-0.5
  if query.dtype == dtype:  # Narrower, it would round; scores are many more.
    score = scores(query * scale, key, bool(mixes), dtype)
  else:
    score = scores(query, key, bool(mixes), dtype) * scale
  score = _composed(score, 'pre', queries, keys, mixes)
  mask_BTS = document_mask(
    queries['positions'],
    keys['positions'],
    queries['segments'],
    keys['segments'],
    sight.window,
    reach=queries['reach'],
    is_causal=sight.is_causal,
  )
  # A finite bound: with -inf a query that sees no key would give NaN.
  bound = jnp.finfo(dtype).min
  mask = mask_BTS[:, :, None, None] if mixes else mask_BTS[:, None, None]
  weight = softmax(jnp.where(mask, score, bound))
  weight = _composed(weight, 'post', queries, keys, mixes)
  encoded = sums(weight, value, bool(mixes), query.dtype)
  merged = mesh.act(f'BT{letter}H')
  encoded = encoded.reshape(B, T, N, H, out_sharding=merged)
  sees_any = mask_BTS.any(axis=-1)[:, :, None, None]
  return jnp.where(sees_any, encoded, jnp.zeros_like(encoded))


def _composed(
  score: Float[Array, 'B _ _ _ S'],
  name: str,
  queries: _Side,
  keys: _Side,
  mixes: _Mixes,
):
  if name not in mixes:
    return score
  mix = dataclasses.replace(mixes[name], query=queries[name], key=keys[name])
  heads = score.reshape(*score.shape[:2], -1, score.shape[-1])
  # Reshapes with dimensions of length 1 may lose the batch's axes.
  out = compose(heads, mix).reshape(score.shape)
  return mesh.reshard(out, mesh.spec_of(score))


def attention_reference(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  query_positions: Int[Array, 'B T'],
  key_positions: Int[Array, 'B S'],
  query_segments: Int[Array, 'B T'],
  key_segments: Int[Array, 'B S'],
  *,
  window: int = 0,
  reach: Int[Array, 'B T'] | None = None,
  is_causal: bool = True,
  pre: HeadMix | None = None,
  post: HeadMix | None = None,
):
  """The definition, with every head's keys written out; tests only."""
  num_groups = query.shape[2] // key.shape[2]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  key = jnp.repeat(key, num_groups, axis=2).astype(dtype)
  value = jnp.repeat(value, num_groups, axis=2).astype(dtype)
  score = jnp.einsum('btnh,bsnh->btns', query.astype(dtype), key)
  score *= query.shape[-1] ** -0.5
  if pre is not None:
    score = compose_reference(score, pre)
  mask = document_mask(
    query_positions, key_positions, query_segments, key_segments, window,
    reach=reach, is_causal=is_causal,
  )[:, :, None]  # fmt: skip
  score = jnp.where(mask, score, 0.0)
  weight = jnp.where(mask, jnp.exp(score), 0.0)
  total = weight.sum(axis=-1, keepdims=True)
  weight = weight / jnp.where(total > 0, total, 1.0)
  if post is not None:
    weight = compose_reference(weight, post)
  return jnp.einsum('btns,bsnh->btnh', weight, value).astype(query.dtype)
