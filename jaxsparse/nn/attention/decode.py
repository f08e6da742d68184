# SPDX-License-Identifier: Apache-2.0
"""A layer's attention of one token by one kernel of a GPU, from heads on."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.attention import cache as attention_cache
from jaxsparse.nn.attention import rotation
from jaxsparse.nn.attention.cache import Cache
from jaxsparse.ops.attention import rope
from jaxsparse.ops.kernels import attend as kernel


def attended(
  config: ModelConfig,
  layer: int,
  heads: Float[Array, 'B T N_2K H'],
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
  cache: Cache | None,
) -> tuple[Float[Array, 'B T N H'], Cache] | None:
  """What the heads read, and the cache with their rows.

  A token sees its document, whose rows stand one after another.

  Args:
    config: of the model.
    layer: number of the block.
    heads: queries, keys and values as they are projected.
    positions: of the tokens in their documents.
    segment_ids: documents; 0 for padding, of which nothing stays.
    cache: of the layer, as `attention_cache.append` takes it.

  Returns:
    None where there is no such kernel, or it does not do what the layer does.
  """
  is_served = (
    cache is not None
    and heads.shape[1] == 1
    and mesh.platform() == 'gpu'
    and config.attention_kinds[layer] == 'global'
    and config.attention_implementation in ('auto', 'pallas')
    and config.qk_norm == 'none'
    and config.composition(layer) is None
    and config.kv_cache == 'exact'
    and config.rope_dim == config.head_dim
  )
  if not is_served:
    return None
  new = dict(positions=positions, segment_ids=segment_ids)
  _, cache_after = attention_cache.append(cache, new, has_ring=False)
  batch, _, _, width = heads.shape
  settings = rotation.settings(config)
  frequency = rope.frequencies(
    width, settings['max_wavelength'], settings['scaling']
  )
  arrays = (
    heads.reshape(batch, -1),
    jnp.asarray(frequency),
    cache['key'],
    cache['value'],
    # A slot that is full and waits has no next row, which is of no matter. Of
    # each sequence even if that is one, as what is alike is computed once.
    jnp.broadcast_to(cache['index'], positions[:, 0].shape),
    positions[:, 0],
  )
  # As each device has them.
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
  if kernel.unsupported_reason(*shapes, num_heads=config.num_heads):
    return None
  run = mesh.per_device(
    functools.partial(kernel.attend, num_heads=config.num_heads),
    ('B.', '.', 'BKSH', 'BKSH', 'B', 'B'),
    ('B.', 'BKSH', 'BKSH'),
    is_opaque=True,
  )
  y, key, value = run(*arrays)
  y = y.reshape(batch, 1, config.num_heads, width)
  return y, cache_after | dict(key=key, value=value)
