# SPDX-License-Identifier: Apache-2.0
"""Work on parameters that decoding would do again at every step."""

import dataclasses

import jax

from jaxsparse.config import ModelConfig
from jaxsparse.config.model import block_name
from jaxsparse.nn.memory.retrieval import norm


def fuse_key_norms(
  config: ModelConfig, params: dict
) -> tuple[ModelConfig, dict]:
  """The same model with the key norms of its memory layers fused into the keys.

  In float32, as the layer does it, and then in the type that the keys have.

  Args:
    config: of any model; one without normalised keys is returned as it is.
    params: its parameters.

  Returns:
    The config, with key_norm = 'none', and parameters without gains of keys.
  """
  memory = config.memory
  if memory is None or memory.key_norm == 'none':
    return config, params
  fused = dict(params)
  for read, _ in memory.placements:
    block = dict(params[block_name(read)])
    layer = dict(block['memory'])
    layer['keys'] = _fused(
      layer['keys'], layer.pop('key_scale'), memory.key_norm
    )
    fused[block_name(read)] = block | dict(memory=layer)
  memory = dataclasses.replace(memory, key_norm='none')
  return dataclasses.replace(config, memory=memory), fused


@jax.jit(static_argnums=2)
def _fused(keys, scale, kind):
  return norm(keys, scale, -2, kind).astype(keys.dtype)
