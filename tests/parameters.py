# SPDX-License-Identifier: Apache-2.0
"""Parameters without a program that draws them.

JAX's draws, one for each parameter, take several times longer to compile than
the forward pass of a small model does.
"""

import jax
import numpy as np


def draw(init, *inputs, deviation=0.3, seed=0):
  """What `init(key, *inputs)` declares, drawn by NumPy.

  As large as it takes for all parts to matter; means are 0, but 1 for scales.
  """
  rng = np.random.default_rng(seed)

  def draw_leaf(path, leaf):
    mean = 1.0 if path[-1].key.endswith('scale') else 0.0
    return np.asarray(
      mean + deviation * rng.normal(size=leaf.shape), leaf.dtype
    )

  shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
  return jax.tree.map_with_path(draw_leaf, shapes)


def place(params, init, *inputs):
  """Parameters as `init` lays them on the mesh that is set."""
  shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
  mesh = jax.sharding.get_mesh()
  return jax.tree.map(
    lambda x, shape: jax.device_put(x, jax.NamedSharding(mesh, _spec(shape))),
    params,
    shapes,
  )


def _spec(shape):
  # Over Auto axes shapes have none.
  return jax.P() if shape.sharding is None else shape.sharding.spec
