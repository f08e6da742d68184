# SPDX-License-Identifier: Apache-2.0
"""Schedules, groups and masks of the optimizer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import check_groups

from jaxsparse.config import (
  Config,
  DCMHAConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  SparseAttentionConfig,
  TrainConfig,
)
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run.progress import Reporter
from jaxsparse.training import before_start, schedules
from jaxsparse.training import optimizer as optimizer_lib


def ones(shape):
  """From NumPy, which compiles nothing."""
  return jnp.asarray(np.ones(shape, np.float32))


PARAMS = {
  'embedding': ones((5, 4)),
  'block_00': {
    'mlp': {'up': ones((4, 8))},
    'mlp_norm': {'scale': ones(4)},
    'memory': {
      'value_table': ones((9, 4)),
      'cores': ones((2, 1, 2, 2)),
    },
  },
}


@pytest.mark.parametrize(
  ('step', 'rate'),
  [(0, 1.6e-4), (20, 1.576e-3), (250, 1.148e-3), (500, 5.644e-4), (1000, 4e-5)],
)
def test_value_learning_rate_of_the_release(step, rate):
  config = OptimizerConfig(
    learning_rate=4e-4, warmup_steps=20, value_lr_multiplier=4.0
  )
  schedule = schedules.value_learning_rate(config, 1000)
  np.testing.assert_allclose(schedule(step), rate, rtol=3e-4)


def test_value_learning_rate_is_back_when_its_share_is_over():
  config = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=0, final_lr_fraction=1.0,
    value_lr_multiplier=5.0, value_lr_decay_fraction=0.2,
  )  # fmt: skip
  schedule = schedules.value_learning_rate(config, 100)
  for step, multiplier in ((0, 5), (5, 4), (15, 2), (20, 1), (60, 1)):
    np.testing.assert_allclose(schedule(step), multiplier * 1e-2, rtol=1e-5)


def test_warmup_of_a_short_run_ends_in_it():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=50)
  schedule = schedules.learning_rate(config, 20)
  rates = np.array([schedule(step) for step in range(20)])
  assert rates.argmax() == 2
  np.testing.assert_allclose(rates.max(), 1.0)


@pytest.mark.parametrize(('num_steps', 'told'), [(20, '2 steps'), (51, '')])
def test_a_shortened_warmup_is_told(num_steps, told, capsys):
  config = Config(train=TrainConfig(num_steps=num_steps))
  before_start.tell_of_warmup(config, Reporter())
  out = capsys.readouterr().out
  assert told in out
  assert bool(out) == bool(told)


def test_every_leaf_has_its_group():
  labels = optimizer_lib.labels(PARAMS)
  assert labels == {
    'embedding': 'decayed',
    'block_00': {
      'mlp': {'up': 'decayed'},
      'mlp_norm': {'scale': 'undecayed'},
      'memory': {'value_table': 'values', 'cores': 'undecayed'},
    },
  }


BIASED = ModelConfig(
  num_layers=2, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8,
  vocab_size=5, norm='layer', bias='all', qk_norm='projection',
  attention_pattern=('global', 'sparse'), dcmha=DCMHAConfig(),
  sparse=SparseAttentionConfig(block=4, tile=4),
  memory=MemoryConfig(
    num_keys=4, key_dim=4, num_selected=2, value_dim=4, query='per_rank',
    query_bias=True, placements=((0, 0),),
  ),
)  # fmt: skip


def test_no_bias_decays_whatever_its_rank():
  one = jnp.zeros((1, 4), jnp.int32)
  init = Transformer(BIASED).init
  params = jax.eval_shape(init, jax.random.key(0), one, one, one)['params']
  check_groups(params)
  biases = {
    path[-1].key: leaf.ndim
    for path, leaf in jax.tree.leaves_with_path(params)
    if path[-1].key.endswith('bias')
  }
  assert biases.keys() >= {'bias', 'query_bias', 'value_bias', 'coverage_bias'}
  assert max(biases.values()) > 1


def test_muon_takes_the_maps_of_activations_only():
  one = jnp.zeros((1, 4), jnp.int32)
  moe = MoEConfig(
    num_experts=2, num_experts_per_token=1, expert_dim=4, num_shared=1
  )
  model = dataclasses.replace(BIASED, moe=moe, bias='qkv')
  init = Transformer(model).init
  params = jax.eval_shape(init, jax.random.key(0), one, one, one)['params']
  groups = optimizer_lib.labels_with_matrices(params)
  names = {
    '/'.join(part.key for part in path[-2:])
    for path, group in jax.tree.leaves_with_path(groups)
    if group == 'matrices'
  }
  assert names == {
    *(f'attention/{name}' for name in ('query', 'key', 'value', 'output')),
    *(f'{part}/{n}' for part in ('moe', 'shared') for n in ('up', 'down')),
    *('moe/gate', 'shared/gate', 'memory/query', 'memory/output'),
  }
  for group, plain in zip(
    *map(jax.tree.leaves, (groups, optimizer_lib.labels(params))), strict=True
  ):
    assert group == plain or (group, plain) == ('matrices', 'decayed')


def test_decay_and_rate_reach_only_their_group():
  config = OptimizerConfig(
    learning_rate=1e-2,
    warmup_steps=0,
    weight_decay=0.5,
    value_weight_decay=0.25,
    value_lr_multiplier=4.0,
  )
  optimizer = optimizer_lib.make_optimizer(config, 10)

  @jax.jit
  def step(params):
    zero = jax.tree.map(jnp.zeros_like, params)
    return optimizer.update(zero, optimizer.init(params), params)[0]

  updates = step(PARAMS)
  memory = updates['block_00']['memory']
  np.testing.assert_allclose(updates['embedding'], -0.5e-2, rtol=1e-6)
  np.testing.assert_allclose(memory['value_table'], -4 * 0.25e-2, rtol=1e-6)
  assert not np.any(memory['cores'])
  assert not np.any(updates['block_00']['mlp_norm']['scale'])


def test_equals_adamw_when_the_groups_agree():
  config = OptimizerConfig(
    warmup_steps=2, weight_decay=0.1, value_weight_decay=0.1, clip_norm=0.0
  )
  params = {
    'a': np.ones((3, 3), np.float32),
    'value_table': np.full((4, 2), 2.0, np.float32),
  }
  ours = optimizer_lib.make_optimizer(config, 10)
  theirs = optax.adamw(
    schedules.learning_rate(config, 10),
    config.b1,
    config.b2,
    config.epsilon,
    weight_decay=0.1,
  )

  @functools.partial(jax.jit, static_argnums=0)
  def five_steps(optimizer, params):
    state = optimizer.init(params)
    for _ in range(5):
      grads = jax.tree.map(jnp.sin, params)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    five_steps(ours, params),
    five_steps(theirs, params),
  )


def test_balancing_biases_step_by_the_sign_of_the_load():
  """At their own rate: without decay, moments or schedule, nor in the norm."""
  params = {
    'router': ones((4, 3)),
    'router_bias': jnp.asarray(np.array([5.0, -5.0, 5.0], np.float32)),
  }
  assert optimizer_lib.labels(params) == {
    'router': 'decayed',
    'router_bias': 'balance',
  }
  config = OptimizerConfig(warmup_steps=2, weight_decay=0.5)
  optimizer = optimizer_lib.make_optimizer(config, 10, bias_update_rate=0.02)
  state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
  squared_norm = jax.jit(optimizer_lib.squared_norm)
  for load in ([3.0, -1e-4, 0.0], [-30.0, 1e4, 0.0]):
    gradients = {
      'router': np.full((4, 3), 0.5, np.float32),
      'router_bias': np.array(load, np.float32),
    }
    np.testing.assert_allclose(squared_norm(gradients), 12 / 4)
    updates, state = update(gradients, state, params)
    expected = -0.02 * np.sign(load)
    np.testing.assert_allclose(updates['router_bias'], expected, rtol=1e-6)
    assert np.all(np.asarray(updates['router']) < 0)
