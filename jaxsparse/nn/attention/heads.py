# SPDX-License-Identifier: Apache-2.0
"""From a stream to heads and back, as every attention of a model does it."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.layers import RMSNorm, bias, init_variances, weight
from jaxsparse.ops.token_product import token_product


def project(
  module: nn.Module,
  config: ModelConfig,
  x: Float[Array, 'B T D'],
  name: str,
  dims: str,
) -> Float[Array, 'B T N H']:
  """Heads by the matrix `name` of a module, with its bias if there are any.

  Args:
    module: that has the parameters.
    config: of the stream.
    x: of this stream, or of another of any width.
    name: 'query', 'key' or 'value', or 'heads' of all three (`inference.fold`).
    dims: of the matrix.
  """
  num_queries, num_kv = config.num_heads, config.num_kv_heads
  numbers = dict(query=num_queries, heads=num_queries + 2 * num_kv)
  num_heads = numbers.get(name, num_kv)
  shape = (x.shape[-1], num_heads, config.head_dim)
  reading, _ = variances(config, x.shape[-1])
  matrix = weight(module, name, dims, shape, reading, config.dtype)
  heads = token_product('d,dnh->nh', x, matrix)
  if config.bias == 'none':
    return heads
  b = bias(module, f'{name}_bias', dims[1:], shape[1:], heads.ndim)
  return heads + b.astype(heads.dtype)


def normed(
  config: ModelConfig, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Queries and keys by QK-norm, if the stream has it."""
  if config.qk_norm == 'none':
    return query, key
  epsilon = config.qk_norm_epsilon or config.norm_epsilon
  of_query, of_key = (
    RMSNorm(
      epsilon,
      'H' if config.qk_norm == 'head' else dims,
      config.dtype,
      name=name,
    )
    for name, dims in (('query_norm', 'NH'), ('key_norm', 'KH'))
  )
  return of_query(query), of_key(key)


def write(
  module: nn.Module,
  config: ModelConfig,
  encoded: Float[Array, 'B T N H'],
  model_dim: int,
) -> Float[Array, 'B T D']:
  """What heads have read, to a stream of that width, by the matrix `output`."""
  shape = (config.num_heads, config.head_dim, model_dim)
  _, writing = variances(config, model_dim)
  output = weight(module, 'output', 'NHD', shape, writing, config.dtype)
  # G for the heads: einsum contracts letters by the alphabet, and with H before
  # N it would transpose the matrix, in decoding at every step.
  y = token_product('gh,ghd->d', encoded, output, out_sharding=mesh.act('BTD'))
  if config.bias == 'all':
    b = bias(module, 'output_bias', 'D', (model_dim,), y.ndim)
    y += b.astype(y.dtype)
  return y


def variances(config: ModelConfig, model_dim: int) -> tuple[float, float]:
  """Of matrices that read a stream of that width, and of those that write."""
  inner = config.num_heads * config.head_dim
  return init_variances(
    config.init_deviations, model_dim, inner, config.num_layers
  )
