# SPDX-License-Identifier: Apache-2.0
"""Kernels for attention, and whether one runs here.

'pallas' is JAX's splash attention on a TPU and its Triton kernel on a GPU:
neither keeps scores, forward or backward. 'cudnn' does not either, but takes
documents as a mask of all pairs only. All want the queries' own rows as keys.
For one query with a cache 'pallas' is our own kernel for GPUs.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.ops.kernels import probe
from jaxsparse.ops.kernels.decode_attention import decode_attention
from jaxsparse.ops.quantized_rows import QuantizedRows

LIBRARIES = ('pallas', 'cudnn')

# Rows of a kernel's blocks, at most, and what lengths must be multiples of.
_MOST_ROWS = dict(tpu=512, gpu=128)
_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """What decides whether a kernel can serve a call."""

  length: int
  num_keys: int
  num_heads: int
  num_kv_heads: int
  width: int
  dtype: jnp.dtype
  window: int
  is_composed: bool
  # Keys and values of the call.
  is_quantized: bool = False
  is_causal: bool = True
  # Whether queries see up to another position than their own.
  has_reach: bool = False

  @property
  def is_decoding(self) -> bool:
    return self.length == 1 < self.num_keys


def choose(implementation: str, call: Call) -> str:
  """The library's kernel to use, or 'xla'.

  Args:
    implementation: one of `LIBRARIES`, 'xla', or 'auto' for 'pallas' where it
      runs; a GPU's local layers are served better by slices of the keys.
    call: what it is for.

  Raises:
    UserError: the implementation is unknown or can't run here.
  """
  if implementation == 'xla':
    return 'xla'
  if implementation == 'auto':
    platform = mesh.platform()
    is_sliced = platform == 'gpu' and call.window > 0 and not call.is_decoding
    if platform == 'cpu' or is_sliced or unsupported_reason('pallas', call):
      return 'xla'
    return 'pallas'
  if implementation not in LIBRARIES:
    raise UserError(
      f'attention_implementation = {implementation!r} must be one of auto, '
      f'xla, {", ".join(LIBRARIES)}.'
    )
  if why := unsupported_reason(implementation, call):
    raise UserError(
      f"attention_implementation = {implementation!r} can't run here: {why}."
    )
  return implementation


def unsupported_reason(name: str, call: Call) -> str | None:
  """Why a library's kernel can't serve a call, or None if it can."""
  platform = mesh.platform()
  platforms = dict(pallas=('tpu', 'gpu'), cudnn=('gpu',))[name]
  if platform not in platforms:
    return (
      f'it is for {" and ".join(platforms).upper()}, and this is {platform}'
    )
  if call.is_composed:
    return 'it does not compose heads'
  if call.has_reach:
    return 'it knows no prefix whose positions all see each other'
  if call.is_decoding and name == 'pallas' and platform == 'gpu':
    if call.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
      return f'it takes 16 or 32 bits and not {call.dtype}'
    if not call.is_causal:
      return 'one query with many keys is decoding, which is causal'
    return _decoding_error(call)
  if call.length != call.num_keys:
    return f'it has {call.num_keys} keys for {call.length} queries'
  if name == 'cudnn':
    if call.dtype not in (jnp.bfloat16, jnp.float16):
      return f'it takes 16 bits and not {call.dtype}'
  elif call.length % _ROWS:
    return f'{call.length} positions are no multiple of {_ROWS}'
  elif platform == 'gpu' and call.window:
    return 'it knows no window on a GPU'
  return _compilation_error(name, call)


@functools.cache
def _compilation_error(name: str, call: Call) -> str | None:
  def loss(
    query: Float[Array, 'B T N H'],
    key: Float[Array, 'B T K H'],
    value: Float[Array, 'B T K H'],
    segments: Int[Array, 'B T'],
  ):
    y = _KERNELS[name](
      query, key, value, segments, window=call.window, is_causal=call.is_causal
    )
    return y.astype(jnp.float32).sum()

  def heads(number: int):
    shape = (1, call.length, number, call.width)
    return jax.ShapeDtypeStruct(shape, call.dtype)

  arguments = (heads(call.num_heads), *[heads(call.num_kv_heads)] * 2)
  segments = jax.ShapeDtypeStruct((1, call.length), jnp.int32)
  return probe.first_error(jax.grad(loss, (0, 1, 2)), *arguments, segments)


@functools.cache
def _decoding_error(call: Call) -> str | None:
  keys = (1, call.num_kv_heads, call.num_keys, call.width)
  group = call.num_heads // call.num_kv_heads
  query = jax.ShapeDtypeStruct((*keys[:2], group, call.width), call.dtype)
  key = jax.ShapeDtypeStruct(keys, call.dtype)
  if call.is_quantized:
    key = QuantizedRows(
      jax.ShapeDtypeStruct(keys, jnp.int8),
      jax.ShapeDtypeStruct(keys[:-1], jnp.float32),
    )
  rows = [
    jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), (1, keys[2]))
  ]
  kernel = functools.partial(decode_attention, window=call.window)
  return probe.first_error(kernel, query, key, key, *rows, *rows)


def decoding_attention(
  query: Float[Array, 'B 1 N H'],
  key: Float[Array, 'B S K H'] | QuantizedRows,
  value: Float[Array, 'B S K H'] | QuantizedRows,
  query_positions: Int[Array, 'B 1'],
  key_positions: Int[Array, 'B S'],
  query_segments: Int[Array, 'B 1'],
  key_segments: Int[Array, 'B S'],
  window: int = 0,
) -> Float[Array, 'B 1 N H']:
  """Attention of one query for each sequence, where `choose` gave 'pallas'."""

  def run(
    query: Float[Array, 'B 1 N H'],
    key: Float[Array, 'B S K H'] | QuantizedRows,
    value: Float[Array, 'B S K H'] | QuantizedRows,
    *rows: Int[Array, 'B ...'],
  ):
    batch, _, num_heads, width = query.shape
    num_kv_heads = key.shape[2]
    y = decode_attention(
      query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, width),
      # As a cache has them, where this undoes what its reader did.
      jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), key),
      jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), value),
      *(x.squeeze(1) if i % 2 == 0 else x for i, x in enumerate(rows)),
      window=window,
    )
    return (y.reshape(query.shape),)

  of_rows = [
    QuantizedRows('BSK.', 'BSK') if isinstance(x, QuantizedRows) else 'BSK.'
    for x in (key, value)
  ]
  run = mesh.per_device(
    run,
    ('BTN.', *of_rows, 'BT', 'BS', 'BT', 'BS'),
    ('BTN.',),
    is_opaque=True,
  )
  (y,) = run(
    query, key, value, query_positions, key_positions, query_segments,
    key_segments,
  )  # fmt: skip
  return y


def library_attention(
  name: str,
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  window: int = 0,
  is_causal: bool = True,
) -> Float[Array, 'B T N H']:
  """Attention within documents by a kernel that `choose` gave.

  Args:
    name: 'pallas' or 'cudnn'.
    query: N heads, rotated; rows in the order of time.
    key: K heads, rotated.
    value: as `key`.
    segments: document of each row; 0 for padding.
    window: rows that a query sees, its own among them; 0 for all.
    is_causal: whether it sees no later ones.

  Returns:
    Sums of the values; 0 for padding.
  """
  kernel = functools.partial(_KERNELS[name], window=window, is_causal=is_causal)
  run = mesh.per_device(
    lambda *heads: (kernel(*heads),),
    ('BTN.', 'BTK.', 'BTK.', 'BT'),
    ('BTN.',),
    is_opaque=True,
  )
  (y,) = run(query, key, value, segments)
  return jnp.where((segments > 0)[:, :, None, None], y, jnp.zeros_like(y))


def pallas(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  *,
  window: int = 0,
  is_causal: bool = True,
  interpret: bool = False,
):
  """Splash attention or Triton's, by the backend; `interpret` is for tests."""
  how = dict(is_causal=is_causal, interpret=interpret)
  if mesh.platform() == 'gpu':
    return triton(query, key, value, segments, **how)
  return splash(query, key, value, segments, window=window, **how)


def splash(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  *,
  window: int = 0,
  is_causal: bool = True,
  interpret: bool = False,
):
  """JAX's kernel for TPU, one key/value head at a time."""
  module = 'jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_'
  kernels = importlib.import_module(f'{module}kernel')
  masks = importlib.import_module(f'{module}mask')
  batch, length, num_heads, width = query.shape
  num_kv_heads = key.shape[2]
  group = num_heads // num_kv_heads
  shape = (length, length)
  if window:
    mask = masks.LocalMask(shape, _window_around(window, is_causal), 0)
  else:
    mask = (masks.CausalMask if is_causal else masks.FullMask)(shape)
  rows = _block_rows(length, 'tpu')
  names = [field.name for field in dataclasses.fields(kernels.BlockSizes)]
  sizes = {name: rows for name in names if name.startswith('block_')}
  kernel = kernels.make_splash_mqa_single_device(
    masks.MultiHeadMask([mask] * group),
    block_sizes=kernels.BlockSizes(**sizes),
    interpret=interpret,
  )
  query = query.reshape(batch, length, num_kv_heads, group, width)
  query *= jnp.asarray(width**-0.5, query.dtype)

  def one_sequence(
    query: Float[Array, 'T K G H'],
    key: Float[Array, 'T K H'],
    value: Float[Array, 'T K H'],
    segments: Int[Array, 'T'],
  ):
    ids = kernels.SegmentIds(segments, segments)
    one_head = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))
    return one_head(
      jnp.moveaxis(query, 0, 2),
      jnp.moveaxis(key, 0, 1),
      jnp.moveaxis(value, 0, 1),
    )

  # [B, K, G, T, H].
  y = jax.vmap(one_sequence)(query, key, value, segments)
  return jnp.moveaxis(y, 3, 1).reshape(batch, length, num_heads, width)


def triton(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  *,
  is_causal: bool = True,
  interpret: bool = False,
):
  """JAX's Pallas kernel for GPUs, which repeats grouped heads."""
  kernels = importlib.import_module('jax.experimental.pallas.ops.gpu.attention')
  group = query.shape[2] // key.shape[2]
  rows = _block_rows(query.shape[1], 'gpu')
  names = [field.name for field in dataclasses.fields(kernels.BlockSizes)]
  return kernels.mha(
    query,
    *(jnp.repeat(x, group, axis=2) for x in (key, value)),
    segments,
    sm_scale=query.shape[-1] ** -0.5,
    causal=is_causal,
    block_sizes=kernels.BlockSizes(**dict.fromkeys(names, rows)),
    interpret=interpret,
  )


def _block_rows(length: int, platform: str):
  return min(_MOST_ROWS[platform], length & -length)


def cudnn(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  *,
  window: int = 0,
  is_causal: bool = True,
):
  is_same = segments[:, :, None] == segments[:, None, :]
  shape = (len(segments), query.shape[2], *is_same.shape[1:])
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=jnp.broadcast_to(is_same[:, None], shape),
    is_causal=is_causal,
    local_window_size=_window_around(window, is_causal) if window else None,
    implementation='cudnn',
  )


def _window_around(window: int, is_causal: bool):
  """Rows before a query's own that it sees, and rows behind."""
  return window - 1, 0 if is_causal else window - 1


_KERNELS = dict(pallas=pallas, cudnn=cudnn)
