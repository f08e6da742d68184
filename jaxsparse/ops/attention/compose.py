"""Composition of attention heads by each pair of query and key (DCMHA).

Dynamically composable multi-head attention (arXiv:2405.08553) mixes the heads'
scores before the softmax, and their weights after it, by a matrix of its own
for every pair of positions: the identity, a learned one that is the same for
all pairs, and for the query's and for the key's token a low-rank one and a
diagonal one, generated from that token's input.

  out[n] = a[n] (1 + gate_q[n] + gate_k[n]) + sum_m a[m] base[m, n]
         + sum_r (sum_m a[m] read_q[r, m]) write_q[r, n]  and the key's

Heads lie in groups that mix only among themselves. What a token gives for one
of its two compositions are its factors: R vectors over heads that read, R that
write and the gates, in this order, [2 R + 1, N].

Letters: B batch, T queries, S keys, D model width, N heads in G groups of M, C
streams of factors, R ranks, U = 2 R vectors and F = U + 1 factors of a stream,
J inner width of the generator.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
  # Groups G of neighbouring heads, or of the heads n, n + G, n + 2 G, ...; the
  # factors' heads are in the groups' order.
  num_groups: int = dataclasses.field(default=1, metadata=dict(static=True))
  interleave: bool = dataclasses.field(
    default=False, metadata=dict(static=True)
  )


def compose(
  score: Float[Array, 'B T N S'], mix: HeadMix, implementation: str = 'auto'
) -> Float[Array, 'B T N S']:
  """Mixes the heads of every pair.

  Args:
    score: scores or weights of the heads, all finite. A pair that is zero in
      all heads stays zero.
    mix: by what.
    implementation: 'matrices' makes one of [M, M] for each token and group, and
      products of many of them are fast; 'factors' adds up one part after
      another. 'auto' is the first on a CPU for at least as many queries as
      heads, 4 times as fast there in training, and the second elsewhere, which
      the authors found faster on TPUs.
  """
  batch, num_queries, num_heads, num_keys = score.shape
  group = num_heads // mix.num_groups
  if mix.interleave:
    a = score.reshape(batch, num_queries, group, mix.num_groups, num_keys)
    a = jnp.swapaxes(a, 2, 3)
  else:
    a = score.reshape(batch, num_queries, mix.num_groups, group, num_keys)
  if implementation == 'auto':
    on_cpu = jax.default_backend() == 'cpu'
    is_many = on_cpu and num_queries >= num_heads
    implementation = 'matrices' if is_many else 'factors'
  by = dict(matrices=_by_matrices, factors=_by_factors)[implementation]
  out = by(a, mix).reshape(a.shape)
  if mix.interleave:
    out = jnp.swapaxes(out, 2, 3)
  return out.reshape(score.shape)


def _grouped(
  factors: Float[Array, 'B T F N'], mix: HeadMix, dtype: jax.typing.DTypeLike
):
  """[B, T, F, G, M]."""
  return factors.astype(dtype).reshape(*factors.shape[:3], mix.num_groups, -1)


def _by_matrices(a: Float[Array, 'B T G M S'], mix: HeadMix):
  # What is the same for all pairs joins the queries' matrices [B, T, G, M, M].
  matrix = jnp.eye(a.shape[3], dtype=a.dtype)[None, None, None]
  if mix.base is not None:
    matrix = matrix + mix.base.astype(a.dtype)[None, None]
  if mix.query is not None:
    matrix = matrix + _matrices(*_parts(_grouped(mix.query, mix, a.dtype)))
  shape = (*a.shape[:-1], a.shape[3])
  heads = _but_one_group(a)
  out = _by_queries(_but_one_group(jnp.broadcast_to(matrix, shape)), heads)
  if mix.key is not None:
    out += _by_keys(_grouped(mix.key, mix, a.dtype), heads)
  return out


def _but_one_group(x: Float[Array, 'B T G ...']):
  """Without G of [B, T, G, ...]: with it XLA's CPU products are slower."""
  return x[:, :, 0] if x.shape[2] == 1 else x


# Heads [B, T, (G,) M, S] by a matrix [(G,) M, N] of each query, or by one that
# the factors of each key make. Autodiff would multiply the other way around,
# and transpose all heads for it.


@jax.custom_vjp
def _by_queries(
  matrix: Float[Array, 'B T ... M N'], heads: Float[Array, 'B T ... M S']
):
  return jnp.einsum('bt...mn,bt...ms->bt...ns', matrix, heads)


def _save_by_queries(
  matrix: Float[Array, 'B T ... M N'], heads: Float[Array, 'B T ... M S']
):
  return _by_queries(matrix, heads), (matrix, heads)


def _restore_by_queries(
  inputs: tuple[jax.Array, jax.Array], cotangent: Float[Array, 'B T ... N S']
):
  matrix, heads = inputs
  return (
    jnp.einsum('bt...ms,bt...ns->bt...mn', heads, cotangent),
    jnp.einsum('bt...mn,bt...ns->bt...ms', matrix, cotangent),
  )


_by_queries.defvjp(_save_by_queries, _restore_by_queries)


@jax.custom_vjp
def _by_keys(
  factors: Float[Array, 'B S F G M'], heads: Float[Array, 'B T ... M S']
):
  # Turned over once, [B, S, (G,) M, T], as the gradient needs it again.
  heads = jnp.swapaxes(heads, 1, -1)
  out = _batched_matmul(_turned_matrices(factors), heads)
  return jnp.swapaxes(out, 1, -1)


def _save_by_keys(
  factors: Float[Array, 'B S F G M'], heads: Float[Array, 'B T ... M S']
):
  return _by_keys(factors, heads), (factors, heads)


def _restore_by_keys(
  inputs: tuple[jax.Array, jax.Array], cotangent: Float[Array, 'B T ... N S']
):
  factors, heads = inputs
  heads = jnp.swapaxes(heads, 1, -1)
  # Once for both products, [B, S, (G,) T, N].
  cotangent = jnp.moveaxis(jnp.swapaxes(cotangent, 1, -1), -1, -2)
  of_heads = _batched_matmul(cotangent, _turned_matrices(factors))
  read, write, _ = _parts(factors)
  group = factors.shape[-1]
  of_matrix = _batched_matmul(heads, cotangent)
  of_matrix = of_matrix.reshape(*factors.shape[:2], -1, group, group)
  # Matrices this small are never transposed, which takes as long as all else.
  of_read = sum(
    write[..., n, None] * of_matrix[:, :, None, ..., n] for n in range(group)
  )
  of_write = sum(
    read[..., m, None] * of_matrix[:, :, None, :, m] for m in range(group)
  )
  of_gate = jnp.diagonal(of_matrix, axis1=-2, axis2=-1)[:, :, None]
  return (
    jnp.concatenate([of_read, of_write, of_gate], axis=2),
    jnp.swapaxes(jnp.moveaxis(of_heads, -2, -1), 1, -1),
  )


_by_keys.defvjp(_save_by_keys, _restore_by_keys)


def _batched_matmul(
  left: Float[Array, '*batch l m'], right: Float[Array, '*batch m n']
):
  """By the order that XLA's CPU has: an einsum may exchange the sides."""
  batch = tuple(range(left.ndim - 2))
  dims = (((left.ndim - 1,), (left.ndim - 2,)), (batch, batch))
  return jax.lax.dot_general(left, right, dims)


def _parts(factors: Float[Array, 'B T F G M']):
  """[B, T, F, G, M]: what reads and what writes [B, T, R, G, M], the gates."""
  rank = factors.shape[2] // 2
  return factors[:, :, :rank], factors[:, :, rank:-1], factors[:, :, -1]


def _matrices(
  read: Float[Array, 'B T R G M'],
  write: Float[Array, 'B T R G M'],
  gate: Float[Array, 'B T G M'],
):
  """[B, T, G, M, N] from the parts of factors."""
  products = jnp.einsum('btrgm,btrgn->btgmn', read, write)
  diagonal = jnp.eye(gate.shape[-1], dtype=gate.dtype)
  return products + gate[..., None] * diagonal[None, None, None]


def _turned_matrices(factors: Float[Array, 'B S F G M']):
  """[B, S, (G,) N, M]."""
  read, write, gate = _parts(factors)
  return _but_one_group(_matrices(write, read, gate))


def _by_factors(a: Float[Array, 'B T G M S'], mix: HeadMix):
  # [B, T, F, G, M, 1] and [B, 1, F, G, M, S].
  sides = []
  if mix.query is not None:
    sides.append(_grouped(mix.query, mix, a.dtype)[..., None])
  if mix.key is not None:
    of_keys = _grouped(mix.key, mix, a.dtype)
    sides.append(jnp.moveaxis(of_keys, 1, -1)[:, None])
  out = a * sum((factors[:, :, -1] for factors in sides), 1.0)
  for factors in sides:
    rank = factors.shape[2] // 2
    for r in range(rank):
      read = jnp.sum(a * factors[:, :, r], axis=3, keepdims=True)
      out += read * factors[:, :, rank + r]
  if mix.base is not None:
    out += jnp.einsum('btgms,gmn->btgns', a, mix.base.astype(a.dtype))
  return out


def compose_reference(
  score: Float[Array, 'B T N S'], mix: HeadMix
) -> Float[Array, 'B T N S']:
  """`compose` by the full matrix [N, N] of every pair."""
  batch, num_queries, num_heads, num_keys = score.shape
  group = num_heads // mix.num_groups
  is_same_group = jnp.kron(jnp.eye(mix.num_groups), jnp.ones((group, group)))

  def matrix(factors: Float[Array, 'B T F N']):
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
  if mix.interleave:
    head = jnp.arange(num_heads)
    place = head % mix.num_groups * group + head // mix.num_groups
    by_pair = by_pair[:, :, :, place][..., place]
  return jnp.einsum('btms,btsmn->btns', score, by_pair)
