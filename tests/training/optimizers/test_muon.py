# SPDX-License-Identifier: Apache-2.0
"""Muon against its plain formula, on one device and on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.config import OptimizerConfig
from jaxsparse.config.errors import UserError
from jaxsparse.training import optimizer as optimizer_lib

CONFIG = OptimizerConfig(
  name='muon', learning_rate=1e-2, warmup_steps=0, final_lr_fraction=1.0,
  weight_decay=0.5, muon_momentum=0.9,
)  # fmt: skip

# Shape, letters on the mesh, and the shape of the matrices for the oracle.
LEAVES = {
  ('attention', 'query'): ((8, 2, 6), 'DNH', (1, 8, 12)),
  ('attention', 'output'): ((2, 6, 8), 'NHD', (1, 12, 8)),
  ('mlp', 'up'): ((8, 4), 'DF', (1, 8, 4)),
  ('moe', 'down'): ((2, 6, 8), 'XFD', (2, 6, 8)),
  ('memory', 'query'): ((8, 2, 3), 'D..', (1, 8, 6)),
}


def tree(leaves):
  nested = {}
  for (module, name), leaf in zip(LEAVES, leaves, strict=True):
    nested.setdefault(module, {})[name] = leaf
  return {'block_00': nested}


def draw(seed):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=s).astype(np.float32) for s, _, _ in LEAVES.values()]


def orthogonalized(x):
  """Quintic Newton-Schulz iterations, of the wider of `x` and its transpose."""
  is_tall = x.shape[0] > x.shape[1]
  x = x.T if is_tall else x
  x = x / np.sqrt(np.sum(x * x))
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
  return x.T if is_tall else x


def expected(params, gradients):
  """Parameters after a step for each of the gradients."""
  new = []
  for (shape, _, matrices), x, *gs in zip(
    LEAVES.values(), params, *gradients, strict=True
  ):
    x, momentum = x.reshape(matrices).astype(np.float64), 0.0
    for g in gs:
      g = g.reshape(matrices).astype(np.float64)
      momentum = g + 0.9 * momentum
      step = np.stack([orthogonalized(m) for m in g + 0.9 * momentum])
      step *= 0.2 * np.sqrt(max(matrices[1:]))
      x = x - 1e-2 * (step + 0.5 * x)
    new.append(x.reshape(shape))
  return new


@jax.jit
def two_steps(params, gradients):
  optimizer = optimizer_lib.make_optimizer(CONFIG, 10)
  state = optimizer.init(params)
  for grads in gradients:
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(lambda p, u: p + u, params, updates)
  return params, state


@pytest.mark.parametrize('shape', [None, (2, 2, 2)])
def test_a_step_is_that_of_the_formula(shape):
  params, gradients = draw(0), [draw(1), draw(2)]
  trees = tree(params), [tree(g) for g in gradients]
  if shape is None:
    found, _ = two_steps(*trees)
  else:
    devices = mesh.make_mesh(*shape, devices=jax.devices()[:8])
    with jax.set_mesh(devices):
      specs = tree([mesh.param(dims) for _, dims, _ in LEAVES.values()])
      of, more = jax.tree.map(jax.device_put, trees, (specs, [specs] * 2))
      found, state = two_steps(of, more)
    momentum = state.inner_states['matrices'].inner_state[0].trace
    for kept, x in zip(*map(jax.tree.leaves, (momentum, found)), strict=True):
      assert kept.sharding == x.sharding
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    found,
    tree(expected(params, gradients)),
  )


def test_state_and_iterations_of_bfloat16_are_in_float32():
  params, grads = (
    {'mlp': {'up': draw(seed)[2].astype(jnp.bfloat16)}} for seed in (0, 1)
  )
  optimizer = optimizer_lib.make_optimizer(CONFIG, 10)

  @jax.jit
  def step(params, grads):
    return optimizer.update(grads, optimizer.init(params), params)

  updates, state = step(params, grads)
  momentum = state.inner_states['matrices'].inner_state[0].trace
  assert momentum['mlp']['up'].dtype == jnp.float32
  x, g = (np.asarray(of['mlp']['up'], np.float32) for of in (params, grads))
  step = 0.2 * np.sqrt(8) * orthogonalized(g) + 0.5 * x
  np.testing.assert_allclose(updates['mlp']['up'], -1e-2 * step, atol=2e-6)


def test_a_momentum_without_muon_is_refused():
  sentence = "muon_momentum = 0.8 does nothing with name = 'adamw': set it to"
  with pytest.raises(UserError, match=re.escape(sentence)):
    OptimizerConfig(muon_momentum=0.8)
  with pytest.raises(
    UserError, match="name must be one of adamw, muon; got 'lion'"
  ):
    OptimizerConfig(name='lion')
