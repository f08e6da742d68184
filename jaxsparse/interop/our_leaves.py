# SPDX-License-Identifier: Apache-2.0
"""The leaves that a model of ours has, by their paths."""

import math
from typing import Any

import flax.traverse_util
import jax

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.transformer import init_params


def mesh_for(model: ModelConfig) -> jax.sharding.Mesh:
  """Of as many devices at hand as can share every leaf."""
  devices = jax.devices()
  count = math.gcd(len(devices), model.model_dim)
  return mesh.make_mesh(devices=devices[:count])


def abstract(
  model: ModelConfig, devices: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape, type and sharding of each leaf, such as 'block_00/mlp/up'.

  Raises:
    UserError: the mesh can't split the model.
  """

  def init() -> Any:
    return init_params(model, jax.random.key(0))

  return flat(mesh.abstract(init, mesh=devices))


def flat(params: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(params, sep='/')


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.unflatten_dict(leaves, sep='/')
