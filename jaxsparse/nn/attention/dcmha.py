# SPDX-License-Identifier: Apache-2.0
"""The parameters that compose attention heads, see `ops.attention.compose`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from jaxsparse import mesh
from jaxsparse.config.attention import DCMHAConfig
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import weight
from jaxsparse.nn.leading import Leading
from jaxsparse.ops.attention.compose import HeadMix, generate_factors

# Each a stream's part: ('pre', 'query') and so on.
Factors = dict[tuple[str, str], jax.Array]


class DCMHA(nn.Module):
  """Generates what mixes the heads of an attention, with no bias anywhere.

  Leaves, for C streams and G head groups of M: `hidden` [D, G, C, 2 r M],
  `low_rank` [G, C, 2 r M, 2 r, M] and `gate` [D, G, C M]; for a base `pre_base`
  and `post_base` [G, M, M]. Drawn as in the official JAX code: the layer begins
  within about a percent of plain attention.
  """

  config: DCMHAConfig
  num_heads: int
  dtype: jax.typing.DTypeLike | None = None
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(mixes_positions=lambda layer: False)
  def __call__(self, x: Num[Array, '*S D']) -> tuple[Factors, dict]:
    """Factors [*S, F, N] of each stream, and the base of each place."""
    lead = Leading.of(x)
    x = lead.flat(x)
    x = x if self.dtype is None else x.astype(self.dtype)
    config, model_dim = self.config, x.shape[-1]
    num_groups, num_streams = config.num_groups, len(config.streams)
    group, twice_rank = self.num_heads // num_groups, 2 * config.rank
    width = twice_rank * group

    def draw(name, dims, shape, deviation):
      return weight(self, name, dims, shape, deviation**2, x.dtype)

    bases = {}
    if config.base:
      shape = (num_groups, group, group)
      for place in config.places:
        bases[place] = draw(f'{place}_base', '...', shape, 0.1 * group**-0.5)
    if not num_streams:
      return {}, bases
    hidden = draw(
      'hidden',
      'D...',
      (model_dim, num_groups, num_streams, width),
      (2 / (model_dim + width)) ** 0.5,
    )
    low_rank = draw(
      'low_rank',
      '.....',
      (num_groups, num_streams, width, twice_rank, group),
      0.02 / (width**0.5 * (group + config.rank)),
    )
    gate = draw(
      'gate',
      'D..',
      (model_dim, num_groups, num_streams * group),
      0.005 * (2 / (model_dim + group)) ** 0.5,
    )
    factors = generate_factors(x, hidden, low_rank, gate, config.gelu)
    streams = map(lead.restored, jnp.unstack(factors, axis=2))
    return dict(zip(config.streams, streams, strict=True)), bases


def head_mix(
  config: DCMHAConfig | None,
  place: str,
  factors: Factors,
  keys: jax.Array | None,
  bases: dict,
) -> HeadMix | None:
  """What composes heads in one place, 'pre' or 'post'.

  Args:
    config: None for attention without composition.
    place: before or after the softmax.
    factors: of the queries' tokens.
    keys: factors of the keys' tokens [B, S, C, F, N].
    bases: of each place.
  """
  if config is None or place not in config.places:
    return None
  cached = [where for where, side in config.streams if side == 'key']
  key = None
  if keys is not None and place in cached:
    key = keys[:, :, cached.index(place)]
  return HeadMix(
    query=factors.get((place, 'query')),
    key=key,
    base=bases.get(place),
    num_groups=config.num_groups,
  )


def cached_factors(factors: Factors) -> jax.Array | None:
  """The streams of the keys' tokens [B, T, C, F, N]; None if there is none."""
  streams = [array for (_, side), array in factors.items() if side == 'key']
  return jnp.stack(streams, axis=2) if streams else None
