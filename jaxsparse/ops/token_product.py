# SPDX-License-Identifier: Apache-2.0
"""Products of every token with a matrix, on a CPU of tokens in one dimension.

XLA's CPU multiplies [B, T, D] by a matrix as it does [B * T, D], but lays out
what comes before and after for three dimensions: an MLP with its gradients
takes 1.8 times as long (JAX 0.10.2, 16 x 128 tokens, D 128, F 352). XLA's TPU
would copy more for one dimension: a train step has half as much again in
temporaries.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.ops.adapted_matrix import AdaptedMatrix, with_gain

Matrix = Float[Array, '...'] | AdaptedMatrix


class _Observer:
  """Gives what is multiplied with named matrices to a function."""

  def __init__(self, on_product: Callable[[str, str, jax.Array], None]):
    self._on_product = on_product
    # By their ids, and themselves, that no other gets the id.
    self._named: dict[int, tuple[str, Matrix]] = {}

  def name(self, matrix: Matrix, name: str) -> None:
    self._named[id(matrix)] = name, matrix

  def see(self, letters: str, x: jax.Array, matrix: Matrix) -> None:
    if id(matrix) in self._named:
      self._on_product(self._named[id(matrix)][0], letters, x)


# Set around one trace, by whoever wants to know of its inputs.
_OBSERVER: contextvars.ContextVar[_Observer | None] = contextvars.ContextVar(
  'observer', default=None
)


@contextlib.contextmanager
def observed(
  on_product: Callable[[str, str, jax.Array], None],
) -> Iterator[None]:
  """Calls `on_product(name, letters, x)` for products with named matrices."""
  token = _OBSERVER.set(_Observer(on_product))
  try:
    yield
  finally:
    _OBSERVER.reset(token)


def named(matrix: Matrix, name: str) -> Matrix:
  """The matrix, by that name for `observed`."""
  if observer := _OBSERVER.get():
    observer.name(matrix, name)
  return matrix


def token_product(
  letters: str,
  x: Float[Array, 'B T ...'],
  matrix: Matrix,
  out_sharding: jax.P | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, 'B T ...']:
  """`jnp.einsum` of each token's dimensions with a matrix.

  Args:
    letters: of a token, of the matrix and of what comes out: 'd,df->f' makes
      [B, T, F] of [B, T, D] and [D, F].
    x: of tokens.
    matrix: the same for all tokens; where it has adapters, for all tokens of a
      sequence.
    out_sharding: of the result, where it is not as its sides have it.
    dtype: of the sums and the result, by default that of the sides.
  """
  if observer := _OBSERVER.get():
    observer.see(letters, x, matrix)
  if isinstance(matrix, AdaptedMatrix):
    return _adapted_product(letters, x, matrix, out_sharding, dtype)
  left, right = letters.split(',')
  matrix_letters, out = right.split('->')
  # What is still to be added up can't be reshaped.
  is_partial = out_sharding is not None and bool(out_sharding.unreduced)
  if is_partial or mesh.platform() != 'cpu':
    return jnp.einsum(
      f'BT{left},{matrix_letters}->BT{out}',
      x,
      matrix,
      preferred_element_type=dtype,
      out_sharding=out_sharding,
    )
  num_rows, length = x.shape[:2]
  y = jnp.einsum(
    f'S{left},{matrix_letters}->S{out}',
    _reshaped(x, (num_rows * length, *x.shape[2:]), slice(1, 2)),
    matrix,
    preferred_element_type=dtype,
    out_sharding=_without(out_sharding, slice(1, 2)),
  )
  return _reshaped(y, (num_rows, length, *y.shape[1:]), slice(1, 1), (None,))


def _adapted_product(letters, x, matrix, out_sharding, dtype):
  """The base's product and the adapter's: through R numbers of each token."""
  if matrix.magnitude is not None:
    matrix = with_gain(matrix)
  left, right = letters.split(',')
  of, out = right.split('->')
  lora = matrix.letters(of, 'R', several='B')
  y = token_product(letters, x, matrix.base, out_sharding, dtype)
  a, b, low = matrix.a, matrix.b, mesh.act('BT.')
  if out_sharding is not None and out_sharding.unreduced:
    # Each device has some of the R, so that these are left to add up, too.
    low = mesh.act('BTW')
    pad = -matrix.rank % mesh.shards('W')[1]
    first = '' if matrix.chosen is None else '.'
    rank = first + 'W' + '.' * (b.ndim - len(first) - 1)
    a = jnp.pad(a, [(0, pad * (i == a.ndim - 1)) for i in range(a.ndim)])
    b = jnp.pad(b, [(0, pad * (dim == 'W')) for dim in rank])
    b = mesh.reshard(b, mesh.act(rank))
  if matrix.key is not None:
    x = _dropped(x, matrix.dropout, matrix.key)
  if matrix.chosen is None:
    x = matrix.scale * token_product(f'{left},{lora["a"]}->R', x, a, low)
    x = token_product(f'R,{lora["b"]}->{out}', x, b, out_sharding, dtype)
  else:
    a, b = (_of_sequences(x, matrix.chosen) for x in (a, b))
    x = jnp.einsum(f'BT{left},{lora["a"]}->BTR', x, a, out_sharding=low)
    x = matrix.scale * x
    x = jnp.einsum(
      f'BTR,{lora["b"]}->BT{out}',
      x,
      b,
      preferred_element_type=dtype,
      out_sharding=out_sharding,
    )
  return y + x.astype(y.dtype)


def _dropped(x, rate, key):
  """`x` without a share of its numbers, the same ones on every mesh."""
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  keep = mesh.reshard(keep, mesh.spec_of(x))
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _of_sequences(x, chosen):
  """The arrays [B, ...] that sequences have, of those of all adapters."""
  spec = mesh.spec_of(x)
  tokens = mesh.act('B')
  if tokens is not None:
    rest = [] if spec is None else list(spec)[1:]
    spec = jax.P(*tokens, *rest)
  return x.at[chosen].get(mode='promise_in_bounds', out_sharding=spec)


def token_product_reference(
  letters: str, x: Float[Array, 'B T ...'], matrix: Float[Array, '...']
) -> Float[Array, 'B T ...']:
  """The same in the dimensions that `x` has; tests only."""
  left, right = letters.split(',')
  matrix_letters, out = right.split('->')
  return jnp.einsum(f'BT{left},{matrix_letters}->BT{out}', x, matrix)


def _reshaped(x, shape, place, axes=()):
  spec = _without(mesh.spec_of(x), place, axes)
  return x.reshape(shape, out_sharding=spec)


def _without(spec, place, axes=()):
  """`spec` with `axes` in place of those at `place`."""
  if spec is None:
    return None
  entries = list(spec)
  entries[place] = axes
  return jax.P(*entries)
