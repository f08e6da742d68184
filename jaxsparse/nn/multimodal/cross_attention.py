# SPDX-License-Identifier: Apache-2.0
"""Attention of one stream to another of any width, and what is made of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.attention import heads
from jaxsparse.nn.attention.maps import show
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import MLP, NORMS, weight
from jaxsparse.nn.multimodal.masks import only_there
from jaxsparse.ops.attention.dense import attention
from jaxsparse.ops.patches import mean_of_segments

# Of each head of the stream that is read [B, S, K, H], 'key' and 'value'.
KeysAndValues = dict[str, jax.Array]


class CrossAttention(nn.Module):
  """Queries of one stream read all of another's segment of the same number.

  Leaves as those of `Attention`, with `key` and `value` [E, K, H] of the other
  stream's width E. Nothing is rotated, as places of two streams have no
  distance, and heads are not composed.

  Attributes:
    config: of the reading stream.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    other: Float[Array, 'B S E'] | None,
    segment_ids: Int[Array, 'B T'],
    other_segment_ids: Int[Array, 'B S'],
    gate: Float[Array, 'B S'] | None = None,
    kept: KeysAndValues | None = None,
  ) -> tuple[Float[Array, 'B T D'], KeysAndValues]:
    """What to add to the stream, and what is read.

    The first is 0 where nothing is there to be read.

    Args:
      x: the reading stream, normalised.
      other: the one that is read, normalised; None where `kept` is given.
      segment_ids: which item each position is of; 0 for padding.
      other_segment_ids: likewise.
      gate: factors of what is read of each position of the other.
      kept: of an earlier call, in place of `other`.
    """
    config = self.config
    x = x.astype(config.dtype)
    query = heads.project(self, config, x, 'query', 'DNH')
    if kept is None:
      assert other is not None
      other = other.astype(config.dtype)
      kept = {
        name: heads.project(self, config, other, name, 'DKH')
        for name in ('key', 'value')
      }
    value = kept['value']
    query, key = heads.normed(config, query, kept['key'])
    if gate is not None:
      value *= gate[..., None, None].astype(value.dtype)

    def read(value):
      return attention(
        query,
        key,
        value,
        jnp.zeros_like(segment_ids),
        jnp.zeros_like(other_segment_ids),
        segment_ids,
        other_segment_ids,
        is_causal=False,
        chunk=config.query_chunk,
      )

    show(self, value, weights=read)
    return heads.write(self, config, read(value), x.shape[-1]), kept


def norm(config: ModelConfig, name: str) -> nn.Module:
  """A norm of a stream."""
  kind = NORMS[config.norm]
  return kind(config.norm_epsilon, dtype=config.dtype, name=name)


def mlp(config: ModelConfig, name: str) -> nn.Module:
  """An MLP of a stream, which returns metrics besides."""
  return MLP(
    config.mlp_dim,
    config.mlp,
    config.num_layers,
    config.dtype,
    use_bias=config.bias == 'all',
    deviations=config.init_deviations,
    name=name,
  )


class Pool(nn.Module):
  """One vector for each segment of a stream: 0 for one without a position.

  'mean' has no parameters. 'attention' is SigLIP's (arXiv:2303.15343): a
  learned query, the leaf `query` [D], reads the segment, and an MLP is added.

  Attributes:
    kind: 'mean' or 'attention'.
    config: of the stream.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  kind: str
  config: ModelConfig
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(returns=('tokens',))
  def __call__(
    self,
    x: Float[Array, 'B L D'],
    segment_ids: Int[Array, 'B L'],
    num_segments: int = 1,
  ) -> tuple[Float[Array, 'B G D']]:
    """Vectors of segments 1 to G, of 'mean' in f32.

    Args:
      x: the stream, normalised.
      segment_ids: which segment each position is of; 0 for padding.
      num_segments: G.
    """
    x = only_there(x, segment_ids)
    if self.kind == 'mean':
      return (mean_of_segments(x, segment_ids, num_segments),)
    config, width = self.config, x.shape[-1]
    query = weight(self, 'query', '.D', (1, width), 1 / width, config.dtype)
    queries = jnp.broadcast_to(query[None], (len(x), num_segments, width))
    queries = mesh.reshard(queries, mesh.act('BTD'))
    wanted = jnp.arange(1, num_segments + 1, dtype=segment_ids.dtype)[None]
    has_any = (segment_ids[:, None, :] == wanted[..., None]).any(-1)
    y, _ = CrossAttention(config, name='attention')(
      queries, x, jnp.where(has_any, wanted, 0), segment_ids
    )
    added, _ = mlp(config, 'mlp')(norm(config, 'mlp_norm')(y))
    return (jnp.where(has_any[..., None], y + added, jnp.zeros_like(y)),)


def normalised(x: Float[Array, '*B E']) -> Float[Array, '*B E']:
  """Of length 1, in f32; a vector of zeros stays one, with gradient 0."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, 1e-12))
