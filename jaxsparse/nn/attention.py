"""Grouped-query self-attention with RoPE, optional QK-norm and a KV cache."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.layers import Metrics, RMSNorm, weight
from jaxsparse.ops.attention import attention
from jaxsparse.ops.rope import apply_rope

Cache = dict[str, jax.Array]


def init_positions(batch_size: int, length: int) -> Cache:
  """The part of a cache that all layers share, before the first token.

  `index` is the next row to be written. Unused rows are padding, segment 0.
  """

  def empty():  # Each its own buffer, as all of the cache may be donated.
    return mesh.reshard(
      jnp.zeros((batch_size, length), jnp.int32), mesh.act('BS')
    )

  return dict(
    index=jnp.zeros((), jnp.int32), positions=empty(), segment_ids=empty()
  )


def init_key_values(config: ModelConfig, batch_size: int, length: int) -> Cache:
  """One layer's own part of a cache: keys and values [B, S, K, H]."""
  shape = (batch_size, length, config.num_kv_heads, config.head_dim)
  key, value = (
    mesh.reshard(jnp.zeros(shape, config.dtype), mesh.act('BSKH'))
    for _ in range(2)
  )
  return dict(key=key, value=value)


def extend(cache: Cache, **new: jax.Array) -> Cache:
  """Writes T new rows of every array at `index`, which then moves on by T.

  The cache must have room: rows that do not fit would overwrite the last ones.
  """
  write = functools.partial(
    jax.lax.dynamic_update_slice_in_dim, start_index=cache['index'], axis=1
  )
  num_new = new['positions'].shape[1]
  rows = {name: write(cache[name], array) for name, array in new.items()}
  return dict(cache, index=cache['index'] + num_new, **rows)


class Attention(nn.Module):
  """Token mixer: every head reads its document up to its own position.

  Leaves: `query` [D, N, H], `key` and `value` [D, K, H], `output` [N, H, D];
  with QK-norm also `query_norm` and `key_norm`, one gain for all heads.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    positions: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B T D'], Cache | None, Metrics]:
    """Reads the T new tokens, and with a cache everything before them too.

    Args:
      x: the normalised residual stream.
      positions: position of each token in its document.
      segment_ids: document of each token; 0 for padding.
      cache: what `init_positions` and `init_key_values` made, and this layer
        extended; None when all tokens are in `x`.

    Returns:
      What to add to the residual stream, the extended cache, and no metrics.
    """
    config, model_dim = self.config, x.shape[-1]
    query, key, value = self._project(x.astype(config.dtype), positions)
    if cache is None:
      keys = dict(key=key, value=value)
      keys |= dict(positions=positions, segment_ids=segment_ids)
    else:
      cache = keys = extend(
        cache,
        key=key,
        value=value,
        positions=positions,
        segment_ids=segment_ids,
      )
    encoded = attention(
      query,
      keys['key'],
      keys['value'],
      positions,
      keys['positions'],
      segment_ids,
      keys['segment_ids'],
    )
    shape = (config.num_heads, config.head_dim, model_dim)
    variance = 1 / (2 * config.num_layers * shape[0] * shape[1])
    output = weight(self, 'output', 'NHD', shape, variance, config.dtype)
    # G for the heads: einsum contracts letters by the alphabet, and with H
    # before N it would transpose the matrix, in decoding at every step.
    y = jnp.einsum(
      'btgh,ghd->btd', encoded, output, out_sharding=mesh.act('BTD')
    )
    return y, cache, {}

  def _project(self, x: jax.Array, positions: jax.Array):
    config, model_dim = self.config, x.shape[-1]

    def project(name: str, dims: str, num_heads: int) -> jax.Array:
      shape = (model_dim, num_heads, config.head_dim)
      matrix = weight(self, name, dims, shape, 1 / model_dim, config.dtype)
      return jnp.einsum('btd,dnh->btnh', x, matrix)

    query = project('query', 'DNH', config.num_heads)
    key = project('key', 'DKH', config.num_kv_heads)
    value = project('value', 'DKH', config.num_kv_heads)
    if config.use_qk_norm:
      norm = functools.partial(
        RMSNorm, epsilon=config.norm_epsilon, dim='H', dtype=config.dtype
      )
      query, key = norm(name='query_norm')(query), norm(name='key_norm')(key)
    rotate = functools.partial(
      apply_rope, positions=positions, max_wavelength=config.rope_max_wavelength
    )
    return rotate(query), rotate(key), value
