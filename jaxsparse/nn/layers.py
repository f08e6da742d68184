# SPDX-License-Identifier: Apache-2.0
"""The small parts: weights, norms, embedding, MLP, dropout.

A matrix is drawn from N(0, 1 / fan_in): an input of unit variance gives an
output of unit variance. Matrices that write into the residual stream of an
L-layer model are drawn from N(0, 1 / (2 L fan_in)): the 2L branches together
then add about unit variance.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxsparse import mesh
from jaxsparse.nn.door import portable
from jaxsparse.nn.leading import Leading, require_floats
from jaxsparse.nn.parameter import gathered, parameter
from jaxsparse.ops.token_product import named, token_product

Metrics = dict[str, jax.typing.ArrayLike]
# Those that training adds to the loss, each the sum over all layers.
LOSSES = frozenset({'aux_loss', 'sparsity_loss'})


def weight(
  module: nn.Module,
  name: str,
  dims: str,
  shape: tuple[int, ...],
  variance: float,
  dtype: jax.typing.DTypeLike,
) -> Any:
  """Declares a float32 normal parameter and returns it ready for a matmul.

  It is gathered over `data` before the cast: its gradient is summed over the
  devices in float32. A quantized one is turned into numbers of `dtype`; an
  `AdaptedMatrix` stays one, for `token_product`.
  """

  init = mesh.sharded(nn.initializers.normal(variance**0.5), mesh.param(dims))
  matrix = gathered(parameter(module, name, init, shape), dims, dtype)
  return named(matrix, '/'.join((*module.path, name)))


def init_variances(
  deviations: tuple[float, float], fan_in: int, inner: int, num_layers: int
) -> tuple[float, float]:
  """Of matrices that read the residual stream, and of those that write to it.

  Args:
    deviations: of both; 0 for unit variance within, and 1 / (2 L) of it added.
    fan_in: width of what is read.
    inner: width of what is written from.
    num_layers: depth L of the model.
  """
  reading, writing = (deviation**2 for deviation in deviations)
  return reading or 1 / fan_in, writing or 1 / (2 * num_layers * inner)


def dropout(
  x: Num[Array, '*S D'], rate: float, rng: jax.Array
) -> Float[Array, '*S D']:
  """Zeroes a share `rate` of `x` and scales up the rest.

  The same entries on every mesh.
  """
  lead = Leading.of(x)
  x = lead.flat(x)
  keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
  keep = mesh.reshard(keep, mesh.act('BTD'))
  return lead.restored(jnp.where(keep, x / (1 - rate), jnp.zeros_like(x)))


class RMSNorm(nn.Module):
  """Division by the root mean square (Zhang and Sennrich, arXiv:1910.07467).

  Over the last dimension, or the last ones, statistics and gain in float32; the
  output is of type `dtype`, by default that of the input. `dims` are the
  letters of these dimensions: the gain has them all, and is stored as other
  parameters with these letters; a gain of None is in the matrices that follow,
  see `inference.fold`.
  """

  epsilon: float = 1e-5
  dims: str = 'D'
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, x: Num[Array, '*B D']) -> Float[Array, '*B D']:
    require_floats(x)
    axes = tuple(range(-len(self.dims), 0))
    init = mesh.sharded(nn.initializers.ones, mesh.param(self.dims))
    scale = self.param('scale', init, x.shape[axes[0] :])
    dtype = x.dtype if self.dtype is None else self.dtype
    x = x.astype(jnp.float32)
    # Over dimensions that the mesh splits, too: the mean is of all devices.
    mean_square = jnp.square(x).mean(axis=axes, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon)
    if scale is not None:
      scale = mesh.gather(scale, self.dims)
      x *= scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return x.astype(dtype)


class LayerNorm(nn.Module):
  """Mean 0, variance 1, then gain and bias (Ba et al., arXiv:1607.06450).

  As `RMSNorm` otherwise.
  """

  epsilon: float = 1e-5
  dims: str = 'D'
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, x: Num[Array, '*B D']) -> Float[Array, '*B D']:
    require_floats(x)
    dtype = x.dtype if self.dtype is None else self.dtype
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = RMSNorm(self.epsilon, self.dims, name='gain')(x)
    return (x + bias(self, 'bias', self.dims, x.shape[-1:], x.ndim)).astype(
      dtype
    )


NORMS = dict(rms=RMSNorm, layer=LayerNorm)


def bias(
  module: nn.Module, name: str, dims: str, shape: tuple[int, ...], num_dims: int
) -> jax.Array:
  """A float32 parameter that begins at 0, for arrays of `num_dims`."""
  init = mesh.sharded(nn.initializers.zeros, mesh.param(dims))
  value = mesh.gather(module.param(name, init, shape), dims)
  return value.reshape((1,) * (num_dims - len(shape)) + shape)


class Embed(nn.Module):
  """Token table, drawn from N(0, 1 / D).

  The same table as output projection gives logits of unit variance. Lookups
  are not scaled up to it: the residual stream would start as the token itself,
  and a tied output would begin by predicting every token once more.
  """

  vocab_size: int
  model_dim: int
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):
    self.table = weight(
      self,
      'table',
      'VD',
      (self.vocab_size, self.model_dim),
      1 / self.model_dim,
      self.dtype,
    )

  def __call__(self, tokens: Num[Array, '*S']) -> Float[Array, '*S D']:
    lead = Leading.of_tokens(tokens)
    rows = self.table.at[lead.flat(tokens)]
    return lead.restored(rows.get(out_sharding=mesh.act('BTD')))

  def logits(self, x: Num[Array, '*S D']) -> Float[Array, '*S V']:
    return project_to_vocabulary(x, self.table)


def project_to_vocabulary(
  x: Num[Array, '*S D'], table: Float[Array, 'V D']
) -> Float[Array, '*S V']:
  """Logits, accumulated and returned in float32."""
  lead = Leading.of(x)
  logits = token_product('d,vd->v', lead.flat(x), table, dtype=jnp.float32)
  return lead.restored(logits)


class MLP(nn.Module):
  """Feed-forward layer of width F.

  'swiglu' is eq. 6 of Shazeer 2020 (arXiv:2002.05202), with the matrices
  `gate`, `up` and `down`; 'gelu' has `up` and `down` and the tanh form of GELU,
  'gelu_erf' its exact form. With `use_bias` each has a bias besides.
  `num_layers` is the depth L of the model, and `deviations` as
  `init_variances` takes them. With `is_partial` the sum over `model` is left to
  the caller, see `mesh.partial`.
  """

  width: int
  kind: str = 'swiglu'
  num_layers: int = 1
  dtype: jax.typing.DTypeLike | None = None
  is_partial: bool = False
  use_bias: bool = False
  deviations: tuple[float, float] = (0.0, 0.0)
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(mixes_positions=lambda layer: False)
  def __call__(
    self, x: Num[Array, '*S D']
  ) -> tuple[Float[Array, '*S D'], Metrics]:
    lead = Leading.of(x)
    model_dim, width = x.shape[-1], self.width
    x = lead.flat(x)
    x = x if self.dtype is None else x.astype(self.dtype)
    reading, writing = init_variances(
      self.deviations, model_dim, width, self.num_layers
    )

    def project(name: str, width: int = width, dim: str = 'F') -> jax.Array:
      shape = (model_dim, width)
      matrix = weight(self, name, f'D{dim}', shape, reading, x.dtype)
      return self._biased(token_product('d,df->f', x, matrix), name, dim)

    if self.has_variable('params', 'gate_up'):  # See `inference.fold`.
      gate, up = (
        mesh.reshard(half, mesh.act('BTF'))
        for half in jnp.split(project('gate_up', 2 * width, '.'), 2, axis=-1)
      )
      hidden = nn.silu(gate) * up
    elif self.kind == 'swiglu':
      hidden = nn.silu(project('gate')) * project('up')
    else:
      hidden = nn.gelu(project('up'), approximate=self.kind == 'gelu')
    down = weight(self, 'down', 'FD', (width, model_dim), writing, x.dtype)
    spec = mesh.partial('BTD') if self.is_partial else mesh.act('BTD')
    y = token_product('f,fd->d', hidden, down, out_sharding=spec)
    return lead.restored(self._biased(y, 'down', 'D')), {}

  def _biased(self, y, name, dim):
    if not self.use_bias:
      return y
    return y + bias(self, f'{name}_bias', dim, y.shape[-1:], 3).astype(y.dtype)
