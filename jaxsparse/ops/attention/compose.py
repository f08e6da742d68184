# SPDX-License-Identifier: Apache-2.0
"""Composition of attention heads by each pair of query and key (DCMHA).

Dynamically composable multi-head attention (arXiv:2405.08553) mixes the heads'
scores before the softmax, and their weights after it, by a matrix of its own
for every pair of positions: the identity, a learned one that is the same for
all pairs, and for the query's and for the key's token a low-rank one and a
diagonal one, generated from that token's input.

  out[n] = a[n] (1 + gate_q[n] + gate_k[n]) + sum_m a[m] base[m, n]
         + sum_r (sum_m a[m] read_q[r, m]) write_q[r, n]  and the key's

Heads lie in groups that mix only among themselves. What a token gives for one
of its two compositions are its factors: r vectors over heads that read, r that
write and the gates, in this order, [2 r + 1, N].

Letters: B batch, T queries, S keys, D model width, N heads in G groups of M, C
streams of factors, r ranks, U = 2 r vectors and F = U + 1 factors of a stream,
J inner width of the generator.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse.ops.attention import cpu

# Added to the mean square of a reading vector. At the start that is no larger,
# so it is a part of the recipe.
_NORM_EPSILON = 1e-6


def generate_factors(
  x: Float[Array, 'B T D'],
  hidden: Float[Array, 'D G C J'],
  low_rank: Float[Array, 'G C J U M'],
  gate: Float[Array, 'D G CM'],
  gelu: str = 'tanh',
) -> Float[Array, 'B T C F N']:
  """Factors of all streams from the attention's input.

  Args:
    x: what queries, keys and values are made of.
    hidden: first layer of the generator.
    low_rank: its second layer, for reading and then for writing vectors.
    gate: of the diagonal parts, C blocks of M.
    gelu: 'tanh', or 'erf' as in the PyTorch port.

  Returns:
    In f32 at least. Each reading vector has a root mean square of
    one over the heads of a group, unless it is as small as the epsilon.
  """
  num_groups, num_streams, _, _, group = low_rank.shape
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  inner = jnp.einsum('btd,dgcj->btgcj', x, hidden.astype(x.dtype))
  inner = jax.nn.gelu(inner, approximate=gelu == 'tanh')
  vectors = jnp.einsum(
    'btgcj,gcjrm->btcrgm',
    inner,
    low_rank.astype(x.dtype),
    preferred_element_type=dtype,
  )
  read, write = jnp.split(vectors, 2, axis=3)
  square = jnp.mean(read * read, axis=-1, keepdims=True)
  read = read * jax.lax.rsqrt(square + _NORM_EPSILON)
  gates = jnp.tanh(
    jnp.einsum(
      'btd,dgh->btgh', x, gate.astype(x.dtype), preferred_element_type=dtype
    )
  )
  gates = gates.reshape(*gates.shape[:3], num_streams, 1, group)
  gates = jnp.moveaxis(gates, 2, 4)
  factors = jnp.concatenate([read, write, gates], axis=3)
  return factors.reshape(*factors.shape[:4], num_groups * group)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadMix:
  """What one composition mixes heads by; None leaves a part out."""

  # Factors of the queries' and of the keys' tokens, [B, T, F, N], [B, S, F, N].
  query: jax.Array | None = None
  key: jax.Array | None = None
  # What is the same for all pairs, beside the identity, [G, M, M].
  base: jax.Array | None = None
  # Groups G of neighbouring heads.
  num_groups: int = dataclasses.field(default=1, metadata=dict(static=True))


def compose(
  score: Float[Array, 'B T N S'], mix: HeadMix
) -> Float[Array, 'B T N S']:
  """Mixes the heads of every pair: one part is added up after another.

  The authors found that faster on TPUs than a matrix of each pair; on a CPU see
  `cpu.compose`.

  Args:
    score: scores or weights of the heads, all finite. A pair that is zero in
      all heads stays zero.
    mix: composition factors and group layout.
  """
  batch, num_queries, num_heads, num_keys = score.shape
  groups = (mix.num_groups, num_heads // mix.num_groups)
  a = score.reshape(batch, num_queries, *groups, num_keys)
  form = cpu.compose if cpu.composes_faster(a) else compose_by_factors
  query, key = (
    x if x is None else x.astype(a.dtype).reshape(*x.shape[:3], *groups)
    for x in (mix.query, mix.key)
  )
  base = None if mix.base is None else mix.base.astype(a.dtype)
  return form(a, query, key, base).reshape(score.shape)


def compose_by_factors(
  a: Float[Array, 'B T G M S'],
  query: Float[Array, 'B T F G M'] | None,
  key: Float[Array, 'B S F G M'] | None,
  base: Float[Array, 'G M M'] | None,
) -> Float[Array, 'B T G M S']:
  """`compose` of heads in groups."""
  # [B, T, F, G, M, 1] and [B, 1, F, G, M, S].
  sides = []
  if query is not None:
    sides.append(query[..., None])
  if key is not None:
    sides.append(jnp.moveaxis(key, 1, -1)[:, None])
  out = a * sum((factors[:, :, -1] for factors in sides), 1.0)
  for factors in sides:
    rank = factors.shape[2] // 2
    for r in range(rank):
      read = jnp.sum(a * factors[:, :, r], axis=3, keepdims=True)
      out += read * factors[:, :, rank + r]
  if base is not None:
    out += jnp.einsum('btgms,gmn->btgns', a, base)
  return out


def compose_reference(
  score: Float[Array, 'B T N S'], mix: HeadMix
) -> Float[Array, 'B T N S']:
  """`compose` by the full matrix [N, N] of every pair."""
  batch, num_queries, num_heads, num_keys = score.shape
  group = num_heads // mix.num_groups
  is_same_group = jnp.kron(jnp.eye(mix.num_groups), jnp.ones((group, group)))

  def matrix(factors):
    rank = factors.shape[2] // 2
    read, write = factors[:, :, :rank], factors[:, :, rank:-1]
    products = jnp.einsum('btrm,btrn->btmn', read, write)
    diagonal = jax.vmap(jax.vmap(jnp.diag))(factors[:, :, -1])
    return products * is_same_group[None, None] + diagonal

  by_pair = jnp.eye(num_heads)[None, None, None]
  if mix.query is not None:
    by_pair = by_pair + matrix(mix.query)[:, :, None]
  if mix.key is not None:
    by_pair = by_pair + matrix(mix.key)[:, None]
  if mix.base is not None:
    base = jax.scipy.linalg.block_diag(*mix.base)
    by_pair = by_pair + base[None, None, None]
  shape = (batch, num_queries, num_keys, num_heads, num_heads)
  by_pair = jnp.broadcast_to(by_pair, shape)
  return jnp.einsum('btms,btsmn->btns', score, by_pair)
