# SPDX-License-Identifier: Apache-2.0
"""A run that trains a part of its parameters, and takes memory for it alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from inference.small_run import draw_params
from quick_fit import quick_fit
from small_model import CONFIG, make_batch, make_mesh

from jaxsparse import mesh
from jaxsparse.config import (
  Config,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
  saved_config,
)
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, new_workdir
from jaxsparse.training import evaluation, former_state, trained_part
from jaxsparse.training.compile_beside import abstract_batch
from jaxsparse.training.step import finalize, init_parts, train_step

MEMORY = dataclasses.replace(
  CONFIG.model.memory, query_conv_taps=0, placements=((0, 0),)
)


def with_trained(trained, model=None, **optimizer):
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
      CONFIG.model, **dict(num_layers=1, memory=MEMORY) | (model or {})
    ),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, trained=trained, **optimizer
    ),
  )


def num_bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def paths(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree.leaves_with_path(tree)
  }


def abstract(config):
  init, used = functools.partial(init_parts, config), jax.sharding.get_mesh()
  return mesh.abstract(init, mesh=make_mesh((1, 1, 1)) if used.empty else used)


def drawn(config):
  """The state before a step and what is frozen, drawn by NumPy."""
  rng = np.random.default_rng(0)

  def draw(x):
    content = 0.3 * rng.normal(size=x.shape)
    if not x.ndim:
      # The loss scale, whose place a step of any other number would take.
      content = 2.0**10 if x.dtype == np.float32 else 0
    return jax.device_put(np.asarray(content, x.dtype), x.sharding)

  state, frozen = jax.tree.map(draw, abstract(config))
  zeros = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
    state.opt_state,
  )
  return dataclasses.replace(state, opt_state=zeros), frozen


QUERY_AND_VALUE = 'attention/(query|value)$'
# With which leaves are trained, and bytes of moments for each of their numbers.
CASES = dict(
  # By an optimizer for matrices, in float16; each block runs twice.
  matrices=(
    with_trained(
      QUERY_AND_VALUE, dict(dtype='float16', use_remat=True), name='muon'
    ),
    {'block_00/attention/query', 'block_00/attention/value'},
    4,
  ),
  # Values alone, by rows.
  rows=(
    with_trained('value_table$', value_optimizer='lazy_row_adam'),
    {'block_00/memory/value_table'},
    8,
  ),
  # From two micro-batches.
  rows_in_parts=(
    with_trained(
      'value_table$', value_optimizer='row_adam', grad_accumulation=2
    ),
    {'block_00/memory/value_table'},
    8,
  ),
  # Without values, which a row optimizer of theirs has nothing of.
  beside_rows=(
    with_trained(QUERY_AND_VALUE, value_optimizer='row_adam'),
    {'block_00/attention/query', 'block_00/attention/value'},
    8,
  ),
)
MESHES = [
  pytest.param('rows', (1, 1, 1)),
  *(
    pytest.param(case, shape, marks=pytest.mark.slow)
    for case, shape in (
      ('matrices', (1, 1, 1)), ('beside_rows', (1, 1, 1)),
      ('matrices', (8, 1, 1)), ('rows_in_parts', (2, 2, 2)),
      ('beside_rows', (2, 2, 2)),
    )
  ),
]  # fmt: skip


@pytest.mark.parametrize(('case', 'shape'), MESHES)
def test_the_rest_has_no_moments_and_stays_as_it_is(case, shape):
  config, expected, of_moments = CASES[case]
  with jax.set_mesh(make_mesh(shape)):
    state, frozen = drawn(config)
    assert paths(state.params) == expected
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
    assert 4 * num_bytes(moments) == of_moments * num_bytes(state.params)
    before, left = jax.device_get((state.params, frozen))
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    for seed in range(2):
      batch = evaluation.to_global(make_batch(seed))
      state, metrics = step(state, batch, frozen)
  assert np.isfinite(metrics['loss'])
  assert metrics['grad_norm'] > 0
  # It was not donated either.
  jax.tree.map(np.testing.assert_array_equal, frozen, left)
  changed = jax.tree.map(
    lambda a, b: bool(np.any(a != np.asarray(b))), before, state.params
  )
  assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize('trained', ['value_table$', QUERY_AND_VALUE])
def test_steps_left_for_later_are_those_of_what_is_trained(trained):
  config = with_trained(trained, value_optimizer='row_adam')
  with jax.set_mesh(make_mesh((1, 1, 1))):
    state, _ = abstract(config)
    done = jax.eval_shape(functools.partial(finalize, config), state)
  assert paths(done) == paths(state)


def test_a_program_takes_twelve_bytes_for_each_trained_number():
  """Wide matrices and a long table, of which eight tokens use little."""
  memory = dataclasses.replace(MEMORY, num_keys=64, value_dim=64)
  config = with_trained(
    QUERY_AND_VALUE, dict(model_dim=128, mlp_dim=2048, memory=memory)
  )
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, batch_size=1, seq_len=8)
  )
  with jax.set_mesh(make_mesh((1, 1, 1))):
    state, frozen = drawn(config)
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    program = step.lower(state, abstract_batch(config), frozen).compile()
    before, left = jax.device_get((state.params, frozen))
    batch = {k: x[:1, :8] for k, x in make_batch(0).items()}
    after, _ = program(state, evaluation.to_global(batch), frozen)
  jax.tree.map(np.testing.assert_array_equal, frozen, left)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: np.any(a != b), before, after.params)
  )
  found, trained = program.memory_analysis(), num_bytes(before)
  base = num_bytes((before, frozen))
  assert (trained, base) == (2 * 4 * 128 * 32, 4_459_136)
  given = found.argument_size_in_bytes
  assert given == pytest.approx(base + 2 * trained, abs=2000)
  # The state is written where it was, and there is room for a gradient and for
  # activations, but for none of the 4.3 MB of gradients of the rest.
  assert found.output_size_in_bytes - found.alias_size_in_bytes < 2000
  assert found.temp_size_in_bytes < trained + 700_000


def test_what_is_split_is_joined():
  params = dict(a=dict(b=1, c=dict(d=2)), e=3, f=dict(g=4))
  optimizer = dataclasses.replace(CONFIG.optimizer, trained='a/c|f')
  trained, frozen = trained_part.split(optimizer, params)
  assert trained == dict(a=dict(c=dict(d=2)), f=dict(g=4))
  assert frozen == dict(a=dict(b=1), e=3)
  assert trained_part.joined(frozen, trained) == params
  arrays = (dict(a=np.zeros((2, 3))), dict(b=np.zeros(14)))
  said = trained_part.describe(optimizer, *arrays)
  assert said.endswith("'a/c|f' trains 6 of 20 parameters (30.0%).")
  assert trained_part.split(CONFIG.optimizer, params) == (params, {})


def test_nothing_to_train_is_said_in_a_sentence():
  config = with_trained('dcmha')
  with pytest.raises(
    UserError,
    match=r"trained must find a parameter, such as '\w+/.*, got 'dcmha'",
  ):
    jax.eval_shape(functools.partial(init_parts, config))
  with pytest.raises(UserError, match=r"regular expression, got '\('"):
    with_trained('(')
  tables = dict.fromkeys(('a/value_table', 'b/value_table'))
  assert trained_part.trains_tables(CONFIG.optimizer, tables)
  some = dataclasses.replace(CONFIG.optimizer, trained='^a/')
  with pytest.raises(UserError, match="which finds others than 'b/value"):
    trained_part.trains_tables(some, tables)


GIVEN = ModelConfig(
  num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=8, vocab_size=257,
)  # fmt: skip


@pytest.fixture
def fit(monkeypatch, tmp_path):
  """Returns the moments that the newest checkpoint has, by their names."""
  saved, save, run = {}, checkpoint.Checkpoints.save, quick_fit(monkeypatch)

  def note(self, step, params, optimizer, record):
    saved.clear()
    for path, x in jax.tree.leaves_with_path(optimizer['opt_state']):
      if x.ndim:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        saved[name.partition('/inner_state/0/')[2]] = np.asarray(x)
    save(self, step, params, optimizer, record)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', note)

  def fit_and_tell(trained, num_steps):
    config = Config(
      model=GIVEN,
      data=dataclasses.replace(CONFIG.data, batch_size=2),
      optimizer=OptimizerConfig(warmup_steps=1, trained=trained),
      train=TrainConfig(num_steps=num_steps, log_every=1),
    )
    run(config, tmp_path)
    return dict(saved)

  new_workdir.write(tmp_path, Config(model=GIVEN), draw_params(GIVEN), {})
  return fit_and_tell


@pytest.mark.slow
def test_a_run_goes_on_with_another_part(fit):
  query, up = 'mu/block_00/attention/query', 'mu/block_00/mlp/up'
  first = fit('', 1)
  assert {query, up, 'nu/embed/table'} <= first.keys()
  second = fit('attention', 2)
  assert all('attention' in name for name in second)
  third = fit('attention|mlp/up', 3)
  assert third.keys() == second.keys() | {up, up.replace('mu/', 'nu/')}
  # What it had goes on, and what is new had nothing.
  by = third[up][0, 0]
  np.testing.assert_array_equal(third[up], np.full_like(third[up], by))
  np.testing.assert_allclose(third[query], 0.9 * second[query] + by, rtol=1e-6)
  assert np.any(second[query] != first[query])


def moments_of(trained, **optimizer):
  """A config and the shapes of its optimizer's state."""
  config = with_trained(trained, **optimizer)
  return config, abstract(config)[0].opt_state


def by_name(opt_state):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree.leaves_with_path(opt_state)
  }


@pytest.mark.parametrize('before', ['', 'attention'])
def test_moments_of_another_part_are_found(before):
  """Those of all, as versions before had, or of what a start before trained."""
  earlier, saved = moments_of(before)
  config, wanted = moments_of('attention|mlp/up')
  saved = jax.tree.map(lambda x: np.ones(x.shape), saved)
  with jax.set_mesh(make_mesh((1, 1, 1))):
    state, frozen = abstract(config)
    params = trained_part.joined(frozen, state.params)
    record = {'config': saved_config.to_json(earlier)}
    others = former_state.of_other_parts(config, params, record)
  found = [paths(other) for other in others]
  assert paths(saved) in found
  zeros = jax.tree.map(lambda x: np.zeros(x.shape), wanted)
  done = former_state.converted(saved, None, wanted, lambda: zeros, False)
  assert jax.tree.structure(done) == jax.tree.structure(wanted)
  for name, x in by_name(done).items():
    assert np.all(x == (name in paths(saved))), name


def test_rows_that_wait_for_steps_are_not_left_behind():
  _, saved = moments_of('', value_optimizer='row_adam')
  _, wanted = moments_of('attention', value_optimizer='row_adam')
  with pytest.raises(UserError, match='must leave the same tables alone'):
    former_state.converted(saved, None, wanted, lambda: None, True)
  _, wanted = moments_of('memory', value_optimizer='row_adam')
  former_state.converted(saved, None, wanted, lambda: None, True)
