# SPDX-License-Identifier: Apache-2.0
"""A run that trains a part of its parameters, and takes memory for it alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_model import CONFIG, drawn_state, make_batch, make_mesh

from jaxsparse import mesh
from jaxsparse.training import evaluation, trained_part
from jaxsparse.training.step import init_parts, optimizer_of, train_step


def with_trained(trained, model=None, **optimizer):
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, **(model or {})),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, trained=trained, **optimizer
    ),
  )


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def paths(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree.leaves_with_path(tree)
  }


def abstract(config):
  init = functools.partial(init_parts, config)
  return mesh.abstract(init, mesh=jax.sharding.get_mesh())


def begun(config):
  """The state before the first step and what is frozen, of equal numbers."""
  params = drawn_state(CONFIG).params
  state, frozen = abstract(config)
  params = jax.tree.map(
    lambda x, of: jax.device_put(np.array(x), of.sharding),
    params,
    trained_part.joined(frozen, state.params),
  )
  trained, frozen = trained_part.split(config.optimizer, params)
  opt_state = jax.jit(optimizer_of(config).init)(trained)
  step, scale = jax.tree.map(
    lambda x: jax.device_put(
      np.full(x.shape, 2**10 * (x.dtype != int), x.dtype), x.sharding
    ),
    (state.step, state.loss_scale),
  )
  return dataclasses.replace(
    state, params=trained, opt_state=opt_state, step=step, loss_scale=scale
  ), frozen


CASES = dict(
  # With an optimizer for matrices, in float16, in two runs of each block.
  matrices=(
    with_trained(
      'attention/(query|value)$',
      dict(dtype='float16', use_remat=True),
      name='muon',
    ),
    (1, 1, 1),
    # A momentum each.
    4,
  ),
  # Of memory layers alone, of which a step touches rows.
  rows=(
    with_trained(
      'value_table$', value_optimizer='row_adam', grad_accumulation=2
    ),
    (2, 2, 2),
    8,
  ),
)


@pytest.mark.parametrize('case', CASES)
def test_only_what_is_asked_for_is_trained(case):
  config, shape, num_bytes = CASES[case]
  with jax.set_mesh(make_mesh(shape)):
    state, frozen = begun(config)
    asked = {
      'matrices': {
        f'block_{i:02}/attention/{name}'
        for i in (0, 1)
        for name in ('query', 'value')
      },
      'rows': {'block_00/memory/value_table'},
    }[case]
    assert paths(state.params) == asked
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
    assert sum(x.nbytes for x in moments) == num_bytes * count(state.params)
    before = jax.device_get(state.params)
    frozen_before = jax.device_get(frozen)
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    for seed in range(2):
      batch = evaluation.to_global(make_batch(seed))
      state, metrics = step(state, batch, frozen)
    assert np.isfinite(metrics['loss'])
    assert metrics['grad_norm'] > 0
  # None was donated, and none was changed.
  jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
  jax.tree.map(
    lambda a, b: np.testing.assert_(np.any(a != np.asarray(b))),
    before,
    state.params,
  )
