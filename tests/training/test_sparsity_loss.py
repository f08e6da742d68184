# SPDX-License-Identifier: Apache-2.0
"""The loss of the blocks that sparse attention keeps, and when it counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, make_batch, make_mesh

from jaxsparse.config import SparseAttentionConfig
from jaxsparse.config.errors import UserError
from jaxsparse.training.losses import objective
from jaxsparse.training.step import init_state, train_step

NUM_STEPS = CONFIG.train.num_steps


def _config(weight, warmup):
  sparse = SparseAttentionConfig(
    block=2,
    tile=2,
    window_blocks=0,
    max_blocks=3,
    coverage_logit=0.5,
    sparsity_loss_weight=weight,
    sparsity_loss_warmup=warmup,
  )
  model = dataclasses.replace(
    CONFIG.model,
    num_layers=1,
    memory=None,
    attention_pattern=('sparse',),
    sparse=sparse,
  )
  optimizer = dataclasses.replace(CONFIG.optimizer, value_lr_multiplier=1.0)
  return dataclasses.replace(CONFIG, model=model, optimizer=optimizer)


@pytest.mark.parametrize(
  ('warmup', 'shares'),
  [
    (0.0, [1.0] * 10),
    (0.4, [0.0] * 6 + [0.25, 0.5, 0.75, 1.0]),
    (1.0, np.linspace(0.1, 1.0, 10)),
  ],
)
def test_it_rises_over_the_last_steps(warmup, shares):
  metrics = dict(aux_loss=jnp.float32(2.0), sparsity_loss=jnp.float32(8.0))
  at = jax.jit(functools.partial(objective, _config(1.0, warmup)))
  asked = [
    at(jnp.float32(1.0), metrics, jnp.int32(step)) for step in range(NUM_STEPS)
  ]
  np.testing.assert_allclose(asked, 3 + 8 * np.asarray(shares), rtol=1e-6)


def test_training_pays_it_from_the_step_on_where_it_begins():
  with jax.set_mesh(make_mesh((1, 1, 1))):
    first = jax.jit(functools.partial(init_state, _config(5.0, 0.4)))()
  warmed_up = jax.jit(functools.partial(train_step, _config(5.0, 0.4)))

  def after(step):
    with jax.set_mesh(make_mesh((1, 1, 1))):
      state = dataclasses.replace(first, step=jnp.int32(step))
      state, metrics = warmed_up(state, make_batch(0))
    bias = state.params['block_00']['attention']['sparse']['coverage_bias']
    return bias, metrics

  # Paying for blocks makes all tiles cover less; the loss alone does not.
  free, _ = after(5)
  paid, metrics = after(NUM_STEPS - 1)
  assert not (np.asarray(free) < 0.5).all()
  assert (np.asarray(paid) < 0.5).all()
  kept = metrics['block_00/attention/kept_share']
  np.testing.assert_allclose(metrics['sparsity_loss'], 5 * kept, rtol=1e-6)


def test_a_warmup_is_a_share_of_the_steps():
  with pytest.raises(
    UserError, match='sparsity_loss_warmup must be within 0 and 1'
  ):
    SparseAttentionConfig(sparsity_loss_warmup=40.0)
