# SPDX-License-Identifier: Apache-2.0
"""Self-attention with grouped queries, RoPE, and optional QK-norm.

It sees a document up to each position, a window of it or all of it, its heads
may be composed (DCMHA), and it reads earlier tokens from a cache.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.nn.attention import cache as attention_cache
from jaxsparse.nn.attention import decode, heads, rotation
from jaxsparse.nn.attention.cache import Cache
from jaxsparse.nn.attention.dcmha import DCMHA, cached_factors, head_mix
from jaxsparse.nn.attention.kinds import KINDS
from jaxsparse.nn.attention.maps import is_asked_for, probed, show
from jaxsparse.nn.attention.sparse import SparseAttention
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import Metrics
from jaxsparse.nn.leading import Leading
from jaxsparse.ops.attention import slot_rows
from jaxsparse.ops.attention.dense import attention
from jaxsparse.ops.attention.rope import apply_rope, apply_rope_2d


class Attention(nn.Module):
  """Token mixer: every head reads its document up to its own position.

  With `config.is_causal = False` it reads all of it.

  Leaves: `query` [D, N, H], `key` and `value` [D, K, H], `output` [N, H, D];
  with biases also `query_bias` and so on; with QK-norm also `query_norm` and
  `key_norm`, one gain [H] for all heads or one of each, [N, H] and [K, H]; with
  composition those of `DCMHA`, in a sparse block those of `SparseAttention`.

  Attributes:
    config: of the model.
    layer: number of the block, whose place in the pattern counts.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  config: ModelConfig
  layer: int = 0
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(returns=('tokens', 'cache', 'alike'))
  def __call__(
    self,
    x: Num[Array, '*S D'],
    positions: Int[Array, '*S'] | Int[Array, '*S 2'] | None = None,
    segment_ids: Int[Array, '*S'] | None = None,
    cache: Cache | None = None,
    reach: Int[Array, '*S'] | None = None,
  ) -> tuple[Float[Array, '*S D'], Cache | None, Metrics]:
    """Reads the new tokens, and with a cache everything before them too.

    Args:
      x: the residual stream, normalised where norms stand before; the last
        leading dimension is that of positions, and the cache has one batch of
        all before it.
      positions: position of each token in its document, by default that in its
        sequence; a document's tokens come in this order. Without causality
        also a row and a column of each, for a rotation by both.
      segment_ids: document of each token; 0 for padding. By default a sequence
        is one document.
      cache: what `init_shared` and `init_rows` of `attention_cache` made, and
        this layer extended; None when all tokens are in `x`.
      reach: the last position that each token sees, if it is later than its
        own (`ops.attention.spans`); all up to it must be in the same call.

    Raises:
      UserError: `reach` is given to a sparse block or without causality.

    Returns:
      What to add to the residual stream, the extended cache, and the metrics
      of `SparseAttention` if it is one or warms one up.
    """
    lead = Leading.of(x)
    positions, segment_ids = lead.places(positions, segment_ids)
    y, new_cache, metrics = self._attend(
      lead.flat(x),
      lead.flat(positions, 'positions'),
      lead.flat(segment_ids, 'segment_ids'),
      None if lead.is_empty else cache,
      lead.flat(reach, 'reach'),
    )
    cache = cache if lead.is_empty else new_cache
    return lead.restored(y), cache, lead.metrics(metrics)

  def _attend(self, x, positions, segment_ids, cache, reach):
    """`__call__` of sequences [B, T, D]."""
    config, model_dim = self.config, x.shape[-1]
    x = x.astype(config.dtype)
    require(
      reach is None or config.attention_blocks[self.layer] != 'sparse',
      'a prefix or span whose positions all see each other is of global and '
      f'local blocks, but attention_pattern is {config.attention_pattern}.',
    )
    projected, metrics = self._heads(x), {}
    at_once = None
    if len(projected) == 1 and reach is None and not is_asked_for(self):
      at_once = decode.attended(
        config, self.layer, *projected, positions, segment_ids, cache
      )
    if at_once:
      encoded, cache = at_once
    else:
      encoded, cache, metrics = self._mix(
        x, projected, positions, segment_ids, cache, reach
      )
    encoded = probed(self, encoded)
    return heads.write(self, config, encoded, model_dim), cache, metrics

  def _mix(self, x, projected, positions, segment_ids, cache, reach):
    """What heads read of projected ones, by all kinds of attention."""
    config, metrics = self.config, {}
    name = config.attention_kinds[self.layer]
    kind = KINDS.get(name)
    reads_unrotated = kind and kind.reads_unrotated(config, cache is not None)
    met = self._rotated(projected, positions, is_rotated=not reads_unrotated)
    sparse = functools.partial(SparseAttention, config, name='sparse')
    if kind:
      module = kind.module(config, name=name)
      encoded, cache, metrics = module(x, *met, segment_ids, cache)
      if cache is not None:
        index = slot_rows.advanced(cache['index'], segment_ids)
        cache = cache | dict(index=index)
    else:
      if positions.ndim > 2:  # Which no mask looks at.
        positions = positions[..., 0]
      encoded, cache = self._read(x, *met, positions, segment_ids, cache, reach)
      is_warming_up = config.attention_blocks[self.layer] == 'sparse'
      if is_warming_up and self.is_initializing():
        # Makes the parameters with which sparse attention is to go on.
        sparse()(x, *met, segment_ids)
      elif is_warming_up and cache is None and config.sparse.router_width:
        _, _, metrics = sparse(keeps_all=True)(x, *met, segment_ids)
    return encoded, cache, metrics

  def _read(self, x, query, key, value, positions, segment_ids, cache, reach):
    """Reads what is seen, with composed heads or without."""
    config, dcmha = self.config, self.config.composition(self.layer)
    new = dict(
      key=key, value=value, positions=positions, segment_ids=segment_ids
    )
    factors, bases = {}, {}
    if dcmha:
      factors, bases = DCMHA(
        dcmha, config.num_heads, config.dtype, name='dcmha'
      )(x)
      if (of_keys := cached_factors(factors)) is not None:
        # As the cache keeps them, or 16-bit decoding would be another model.
        of_keys = of_keys.astype(x.dtype)
        if cache is not None:
          of_keys = mesh.reshard(of_keys, mesh.act('BT...'))
        new['factors'] = of_keys
    has_ring = attention_cache.is_ring(config, self.layer)
    keys = new
    if cache is not None:
      keys, cache = attention_cache.append(cache, new, has_ring)
    mixes = {
      place: head_mix(dcmha, place, factors, keys.get('factors'), bases)
      for place in ('pre', 'post')
    }

    def read(value, **mixes):
      return attention(
        query,
        keys['key'],
        value,
        positions,
        keys['positions'],
        segment_ids,
        keys['segment_ids'],
        window=config.window if has_ring else 0,
        reach=reach,
        is_causal=config.is_causal,
        chunk=config.query_chunk,
        implementation=self._implementation(cache is not None, x.shape[1]),
        **mixes,
      )

    uncomposed = dict(uncomposed=read) if dcmha else {}
    show(self, value, weights=functools.partial(read, **mixes), **uncomposed)
    return read(keys['value'], **mixes), cache

  def _implementation(self, has_cache, num_new):
    if self.is_initializing():  # By a token, which is no matter for kernels.
      return 'xla'
    if not has_cache:
      return self.config.attention_implementation
    # Kernels for several queries want their own rows as keys, a cache has more.
    one = self.config.attention_implementation in ('auto', 'pallas')
    return 'auto' if one and num_new == 1 else 'xla'

  def _heads(self, x):
    """Queries, keys and values; one array of all where they are folded."""
    project = functools.partial(heads.project, self, self.config, x)
    if self.has_variable('params', 'heads'):
      return (project('heads', 'D.H'),)
    dims = dict(query='DNH', key='DKH', value='DKH')
    return tuple(project(name, dims[name]) for name in dims)

  def _rotated(self, projected, positions, is_rotated):
    """Queries, keys and values as they meet each other."""
    config = self.config
    if len(projected) == 1:
      ends = np.cumsum([config.num_heads, config.num_kv_heads])
      projected = (
        mesh.reshard(part, mesh.act(f'BT{dim}H'))
        for part, dim in zip(
          jnp.split(*projected, ends, axis=2), 'NKK', strict=True
        )
      )
    query, key, value = projected
    query, key = heads.normed(config, query, key)
    if not is_rotated:
      return query, key, value
    rotate = functools.partial(
      apply_rope if positions.ndim == 2 else apply_rope_2d,
      positions=positions,
      **rotation.settings(config),
    )
    return rotate(query), rotate(key), value
