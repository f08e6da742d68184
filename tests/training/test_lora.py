# SPDX-License-Identifier: Apache-2.0
"""LoRA in training: a base that stays, and an adapter that begins as nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from small_model import CONFIG, drawn_state, make_batch, make_mesh, with_experts

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference.quantize import Quantization, quantize
from jaxsparse.nn import adapters as adapter_trees
from jaxsparse.nn.transformer import Transformer, init_cache, init_params
from jaxsparse.training import adapters, evaluation
from jaxsparse.training.step import eval_step, parts_from, train_step

ALL = '(attention|mlp|memory|moe|shared)/(query|key|value|output|up|gate|down)$'


def lora(config=CONFIG, **fields):
  adapter = AdapterConfig(kind='lora', rank=4, **fields)
  return dataclasses.replace(config, adapter=adapter)


LORA = lora(targets=ALL)


def base(config=CONFIG):
  """Parameters laid on the mesh in use."""
  plain = dataclasses.replace(config, adapter=AdapterConfig())
  shapes = mesh_lib.abstract(
    lambda: init_params(config.model, jax.random.key(0)),
    mesh=jax.sharding.get_mesh(),
  )
  return jax.tree.map(
    lambda x, to: jax.device_put(np.array(x), to.sharding),
    drawn_state(plain).params,
    shapes,
  )


def moved(config, params):
  """An adapter as training leaves one: nothing of it is zero."""
  rng = np.random.default_rng(0)
  new, _ = parts_from(config, params)

  def draw(path, x):
    if path[-1].key == 'magnitude':
      return 1.1 * x
    return jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32))

  return jax.tree.map_with_path(draw, new.params)


def equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def close(actual, expected, bound=1e-5):
  actual, expected = np.asarray(actual), np.asarray(expected)
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=bound * np.abs(expected).max()
  )


@functools.cache
def logits_of(config):
  def run(params):
    batch = make_batch(0)
    names = ('tokens', 'positions', 'segment_ids')
    args = (jnp.asarray(batch[name][:2]) for name in names)
    return Transformer(config).apply({'params': params}, *args)[0]

  return jax.jit(run)


def test_at_step_0_it_is_the_base_to_the_bit():
  with jax.set_mesh(make_mesh((1, 1, 1))):
    params = base()
    state, frozen = parts_from(LORA, params)
    joined = adapters.join(LORA, frozen, state.params)
    equal(logits_of(CONFIG.model)(joined), logits_of(CONFIG.model)(params))


@pytest.mark.parametrize('use_dora', [False, True])
def test_merged_is_factored(use_dora):
  config = lora(targets=ALL, use_dora=use_dora, use_rslora=use_dora)
  with jax.set_mesh(make_mesh((1, 1, 1))):
    params = base()
    adapter = moved(config, params)
    joined = adapters.join(config, params, adapter)
    found = logits_of(CONFIG.model)(joined)
    merged = adapter_trees.merged(joined)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    close(found, logits_of(CONFIG.model)(merged))
    assert not np.allclose(found, logits_of(CONFIG.model)(params), atol=1e-2)


def beginning(config, how=None):
  """What is trained, and what stands beside it, on the mesh in use."""
  params = base(config)
  if how:
    params = quantize(config.model, params, how)
  return parts_from(config, params)


@functools.cache
def program(config, shape, how=None):
  """The compiled train step."""
  with jax.set_mesh(make_mesh(shape)):
    state, frozen = beginning(config, how)
    batch = evaluation.to_global(make_batch(0))
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    return step.lower(state, batch, frozen).compile()


@functools.cache
def trained(config, shape, how=None, num_steps=3):
  """Losses, the state and the frozen part after some steps, and before."""
  step = program(config, shape, how)
  with jax.set_mesh(make_mesh(shape)):
    state, frozen = beginning(config, how)
    before, losses = jax.tree.map(np.array, frozen), []
    for seed in range(num_steps):
      batch = evaluation.to_global(make_batch(seed % 3))
      state, metrics = step(state, batch, frozen)
      losses.append(float(metrics['loss']))
  return losses, state, before, jax.tree.map(np.array, frozen)


def test_training_moves_the_adapter_alone():
  losses, state, before, after = trained(LORA, (1, 1, 1), None, 10)
  equal(after, before)
  assert losses[9] < losses[0]
  paths = {p[:-1] for p in adapter_trees.leaves(state.params)}
  assert len(paths) == 2 * (4 + 3) + 2
  # Two moments of each number, and counts of steps.
  size = sum(x.size for x in jax.tree.leaves(state.params))
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sum(x.nbytes for x in moments) == 8 * size
  assert size == adapter_trees.num_parameters(LORA.adapter, before)


def test_memory_is_that_of_base_and_adapter():
  """Base, and 12 bytes for each number of the adapter; no gradient of more."""
  found = program(LORA, (1, 1, 1)).memory_analysis()
  with jax.set_mesh(make_mesh((1, 1, 1))):
    state, frozen = beginning(LORA)
    batch = evaluation.to_global(make_batch(0))

  def num_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))

  adapter = num_bytes(state.params)
  # Parameters of the adapter and two moments; its gradient is a temporary.
  held = num_bytes(frozen) + 3 * adapter + num_bytes(batch)
  assert abs(found.argument_size_in_bytes - held) < 1024
  assert found.alias_size_in_bytes >= 3 * adapter
  assert found.output_size_in_bytes < 3 * adapter + 1024


@pytest.mark.parametrize(
  ('config', 'shape'),
  few(
    [(LORA, (2, 2, 2))],
    [
      (LORA, (2, 2, 2)),
      (lora(targets=ALL, use_dora=True), (2, 2, 2)),
      (lora(targets=ALL, dropout=0.5), (2, 2, 2)),
      (lora(with_experts(), targets=ALL), (2, 2, 2)),
    ],
  ),
)
def test_every_mesh_trains_the_same(config, shape):
  alone, state, *_ = trained(config, (1, 1, 1))
  losses, on_mesh, *_ = trained(config, shape)
  np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
  jax.tree.map(lambda a, b: close(a, b, 1e-3), on_mesh.params, state.params)
