# SPDX-License-Identifier: Apache-2.0
"""What was compiled beside other work is not compiled again."""

import dataclasses
import functools

import jax
import numpy as np
from small_model import CONFIG, make_mesh

from jaxsparse import mesh
from jaxsparse.config import ModelConfig, OptimizerConfig
from jaxsparse.training import evaluation
from jaxsparse.training.compile_beside import abstract_batch, compiling_beside
from jaxsparse.training.step import init_state, train_step

MODEL = ModelConfig(
  num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=8, vocab_size=5,
)  # fmt: skip


def test_the_first_step_is_compiled_once():
  config = dataclasses.replace(CONFIG, model=MODEL, optimizer=OptimizerConfig())
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, fun_name='', **__: (
      event.endswith('backend_compile_duration') and compiled.append(fun_name)
    )
  )
  shape = (config.data.batch_size, config.data.seq_len)
  batch = dict.fromkeys(
    ('tokens', 'targets', 'positions', 'segment_ids'),
    np.ones(shape, np.int32),
  ) | dict(loss_weight=np.ones(shape, np.float32))
  with jax.set_mesh(make_mesh((2, 1, 2))):
    init = jax.jit(functools.partial(init_state, config))
    train = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    abstract = mesh.abstract(init, mesh=jax.sharding.get_mesh())
    with compiling_beside(train, abstract, abstract_batch(config)):
      state = init()
    state, _ = train(state, evaluation.to_global(batch))
  assert sum('train_step' in name for name in compiled) == 1
  assert int(state.step) == 1


def test_what_cannot_be_compiled_is_left_to_the_call():
  def fails(x):
    raise ValueError(x)

  with compiling_beside(jax.jit(fails), 1):
    pass
