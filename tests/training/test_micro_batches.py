# SPDX-License-Identifier: Apache-2.0
"""A step in micro-batches, beside the same step at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, first_state, make_batch, make_mesh

from jaxsparse.config import MoEConfig
from jaxsparse.training import evaluation
from jaxsparse.training.micro_batches import over_micro_batches, weighed
from jaxsparse.training.step import train_step


def test_parts_are_weighed_by_their_tokens():
  """Rows of 8, 4, 2 and 0 tokens, of which each makes a micro-batch."""
  tokens = np.arange(8)[None] < np.array([8, 4, 2, 0])[:, None]
  batch = dict(
    x=np.arange(32, dtype=np.float32).reshape(4, 8), segment_ids=tokens
  )

  def function(micro, share, key):
    count = micro['segment_ids'].sum()
    x = jnp.where(micro['segment_ids'], micro['x'], 0)
    mean = x.sum() / jnp.maximum(count, 1)
    metrics = dict(mean=mean, x_least=x.min(), x_most=x.max())
    return x.sum(), weighed(metrics, share), dict(x=micro['x'])

  @functools.partial(jax.jit, static_argnums=1)
  def run(batch, num):
    return over_micro_batches(function, batch, num, jax.random.key(0))

  once = run(batch, 1)
  total, metrics, kept = run(batch, 4)
  x = np.where(tokens, batch['x'], 0)
  assert total == once[0] == x.sum()
  for found in (once[1], metrics):
    assert found['x_least'] == x.min()
    assert found['x_most'] == x.max()
    np.testing.assert_allclose(found['mean'], x.sum() / 14, rtol=1e-6)
  assert kept['x'].shape == (1, 4, 8)
  np.testing.assert_array_equal(kept['x'][0], batch['x'])


# Neither means over tokens nor extremes.
OTHERS = (
  'usage_fraction',
  'usage_fraction',
  'usage_kl',
  'usage_max',
  'score_std',
)

# Tokens of a row that are no padding, by turns of the micro-batches.
LENGTH = 16 - 3 * (np.arange(16) % 4)


@functools.cache
def first_step(grad_accumulation):
  """Metrics, and the gradients as what Adam's first moments are of them."""
  model = dataclasses.replace(
    CONFIG.model,
    num_layers=1,
    memory=dataclasses.replace(CONFIG.model.memory, placements=((0, 0),)),
    moe=MoEConfig(
      num_experts=4, num_experts_per_token=2, expert_dim=16,
      router_z_loss_weight=1.0, bias_update_rate=0.1, balance_loss_weight=0.0,
    ),
  )  # fmt: skip
  optimizer = dataclasses.replace(
    CONFIG.optimizer, clip_norm=0.0, grad_accumulation=grad_accumulation
  )
  config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer)
  batch = make_batch(0)
  is_text = np.arange(16)[None] < LENGTH[:, None]
  batch['segment_ids'] *= is_text
  batch['loss_weight'] *= is_text
  with jax.set_mesh(make_mesh((1, 1, 1))):
    step = jax.jit(functools.partial(train_step, config))
    state, metrics = step(first_state(config), evaluation.to_global(batch))
  moments = {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(state.opt_state)
    if '.mu' in jax.tree_util.keystr(path)
  }
  moments['bias'] = state.params['block_00']['moe']['router_bias']
  return {name: float(x) for name, x in metrics.items()}, moments


@pytest.mark.slow
def test_a_step_is_that_of_the_whole_batch():
  """Though padding is uneven: loss, means over tokens and all gradients."""
  (whole, gradients), (parts, others) = first_step(1), first_step(4)
  assert whole.keys() == parts.keys()
  for name, value in whole.items():
    is_other = name.endswith(OTHERS)
    assert is_other or parts[name] == pytest.approx(value, rel=1e-4), name
  for name, gradient in gradients.items():
    largest = np.abs(gradient).max()
    np.testing.assert_allclose(
      others[name], gradient, rtol=0, atol=1e-5 * largest, err_msg=name
    )
    assert largest > 0
