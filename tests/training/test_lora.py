# SPDX-License-Identifier: Apache-2.0
"""LoRA in training: the base stays, and the adapter begins as nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from parameters import draw, place
from small_model import CONFIG, make_batch, make_mesh, with_experts

from jaxsparse.analysis import cost
from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference.quantize import Quantization, quantize
from jaxsparse.nn import adapters as adapter_trees
from jaxsparse.nn.transformer import Transformer, init_cache, init_params
from jaxsparse.run import recipe_files
from jaxsparse.training import adapters, evaluation, optimizer
from jaxsparse.training.step import parts_from, train_step

ALL = '(attention|mlp|memory|moe|shared)/(query|key|value|output|up|gate|down)$'
ONE = (1, 1, 1)


def small(config):
  """Of one block."""
  memory = config.model.memory
  if memory:
    memory = dataclasses.replace(memory, placements=((0, 0),))
  model = dataclasses.replace(config.model, num_layers=1, memory=memory)
  train = dataclasses.replace(config.train, start_from='base')
  return dataclasses.replace(config, model=model, train=train)


def lora(config=CONFIG, **fields):
  adapter = AdapterConfig(kind='lora', rank=4, **fields)
  return dataclasses.replace(small(config), adapter=adapter)


LORA = lora(targets=ALL)


def base(config=LORA):
  """Parameters laid on the mesh in use."""

  def init(key):
    return init_params(config.model, key)

  return place(draw(init), init)


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
  return jax.jit(
    lambda params: Transformer(config).apply({'params': params}, *tokens())[0]
  )


def tokens(of=slice(None)):
  batch = make_batch(0)
  names = ('tokens', 'positions', 'segment_ids')
  return [jnp.asarray(batch[name][:4, of]) for name in names]


def decoded(model):
  """Logits of a prompt, and of a token after it, from a cache."""

  @jax.jit
  def run(params):
    module = Transformer(model)
    cache = init_cache(model, 4, 6)
    first, cache, _ = module.apply({'params': params}, *tokens(slice(4)), cache)
    at = tokens(slice(4, 5))
    return first, module.apply({'params': params}, *at, cache)[0]

  return run


def test_at_step_0_it_is_the_base_to_the_bit():
  with jax.set_mesh(make_mesh(ONE)):
    params = base()
    state, frozen = parts_from(LORA, params)
    joined = adapters.join(LORA, frozen, state.params)
    run = logits_of(LORA.model)
    equal(run(joined), run(params))


@pytest.mark.slow
@pytest.mark.parametrize('how', ['decoded', 'remat', 'mesh', 'experts'])
def test_at_step_0_it_is_the_base_wherever_it_runs(how):
  config = lora(with_experts(), targets=ALL) if how == 'experts' else LORA
  model = dataclasses.replace(config.model, use_remat=how == 'remat')
  run = decoded(model) if how == 'decoded' else logits_of(model)
  if how == 'remat':
    run = jax.jit(jax.value_and_grad(lambda p: logits_of(model)(p).sum()))
  with jax.set_mesh(make_mesh((2, 2, 2) if how == 'mesh' else ONE)):
    params = base(config)
    state, frozen = parts_from(config, params)
    joined = adapters.join(config, frozen, state.params)
    if how == 'remat':
      (value, grad), (other, of_base) = run(joined), run(params)
      equal(value, other)
      path = ('block_00', 'attention', 'query')
      found = adapter_trees.at(grad, path).base
      close(found, adapter_trees.at(of_base, path))
    else:
      equal(run(joined), run(params))


@pytest.mark.parametrize('use_dora', few([False], [False, True]))
def test_merged_is_factored(use_dora):
  config = lora(targets=ALL, use_dora=use_dora, use_rslora=use_dora)
  with jax.set_mesh(make_mesh(ONE)):
    params, run = base(), logits_of(LORA.model)
    joined = adapters.join(config, params, moved(config, params))
    found, merged = run(joined), adapter_trees.merged(joined)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    close(found, run(merged))
    assert not np.allclose(found, run(params), atol=1e-2)


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
  losses, state, before, after = trained(LORA, ONE, None, 10)
  equal(after, before)
  assert losses[9] < losses[0]
  paths = {p[:-1] for p in adapter_trees.leaves(state.params)}
  assert len(paths) == 4 + 3 + 2
  # Two moments of each number, and counts of steps.
  size = sum(x.size for x in jax.tree.leaves(state.params))
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sum(x.nbytes for x in moments) == 8 * size
  assert size == adapter_trees.num_parameters(LORA.adapter, before)
  # Base, and 12 bytes for each number of the adapter: itself and two moments.
  # Its gradient is temporary, and there is none of the base.
  found = program(LORA, ONE).memory_analysis()
  held = sum(x.nbytes for x in jax.tree.leaves((before, make_batch(0))))
  assert abs(found.argument_size_in_bytes - held - 12 * size) < 1024
  assert found.alias_size_in_bytes >= 12 * size
  assert found.output_size_in_bytes < 12 * size + 1024


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'shape'),
  [
    (LORA, (2, 2, 2)),
    (lora(targets=ALL, use_dora=True), (2, 2, 2)),
    (lora(targets=ALL, dropout=0.5), (2, 2, 2)),
    (lora(with_experts(), targets=ALL), (2, 2, 2)),
  ],
)
def test_every_mesh_trains_the_same(config, shape):
  alone, state, *_ = trained(config, ONE)
  losses, on_mesh, *_ = trained(config, shape)
  np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
  jax.tree.map(lambda a, b: close(a, b, 1e-3), on_mesh.params, state.params)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['nf4', 'int8'])
def test_a_quantized_base_stays_as_it_is_stored(kind):
  how = Quantization(weights=kind)
  losses, state, before, after = trained(LORA, ONE, how, 10)
  equal(after, before)
  assert losses[9] < losses[0]
  with jax.set_mesh(make_mesh(ONE)):
    joined = adapters.join(LORA, after, state.params)
    numbers = adapter_trees.merged(joined)
    found = adapter_trees.at(numbers, ('block_00', 'mlp', 'up'))
    assert found.base.kind == kind


@pytest.mark.slow
def test_dropout_trains_by_the_seed():
  config = lora(targets=ALL, dropout=0.5)
  with_it, without = trained(config, ONE)[0], trained(LORA, ONE)[0]
  # B is zero at first.
  assert with_it[0] == without[0]
  assert with_it[2] != without[2]
  other = dataclasses.replace(
    config, train=dataclasses.replace(config.train, seed=1)
  )
  assert trained(other, ONE)[0][2] != with_it[2]


ATTENTION = 'attention/(query|value)$'
LINEAR = '(attention|mlp)/(query|key|value|output|up|gate|down)$'


# Of the table of the reference: blocks, width and inner width of the MLP, which
# has two matrices in dense recipes.
@pytest.mark.parametrize(
  ('recipe', 'blocks', 'width', 'inner', 'share_of_dense', 'share_of_all'),
  few(
    [('ultramem:tiny', 4, 128, 0, 0.0410, 0.0174)],
    [
      ('ultramem:tiny', 4, 128, 0, 0.0410, 0.0174),
      ('dense:151m', 12, 1024, 4096, 0.0052, 0.0039),
      ('dense:680m', 24, 1536, 6144, 0.0035, 0.0031),
      ('dense:1b6', 32, 2048, 8192, 0.0026, 0.0024),
      ('ultramem:1b6', 32, 2048, 0, 0.0024, 0.0002),
    ],
  ),
)
def test_the_count_is_that_of_the_closed_form(
  recipe, blocks, width, inner, share_of_dense, share_of_all
):
  config = recipe_files.load(
    '--config', recipe, 'configs', 'get_config', object
  )
  model = config.model.with_vocabulary(257 if 'tiny' in recipe else 50432)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  config = dataclasses.replace(config, model=model)
  for targets, sizes in (
    (ATTENTION, 2 * [2 * width]),
    (LINEAR, 4 * [2 * width] + 2 * [width + inner]),
  ):
    if targets == LINEAR and not inner:
      continue
    adapter = AdapterConfig(kind='lora', targets=targets)
    count = adapter_trees.num_parameters(adapter, shapes)
    assert count == blocks * 16 * sum(sizes)
    train = dataclasses.replace(config.train, start_from='base')
    run = dataclasses.replace(config, adapter=adapter, train=train)
    said = adapters.describe(run, shapes)
    assert said.startswith(f'{count:,} parameters are trained')
    if targets == ATTENTION:
      assert f'{share_of_dense:.2%} of the' in said
      assert f'{share_of_all:.2%} of all' in said


def test_experts_count_among_what_adapters_are_a_share_of():
  config = lora(with_experts(), targets='moe/(gate|up|down)$')
  shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
  of = cost.count_parameters(config.model)
  share = adapter_trees.num_parameters(config.adapter, shapes) / (
    of.dense + of.experts
  )
  said = adapters.describe(config, shapes)
  assert (
    f'{share:.2%} of the {(of.dense + of.experts) / 1e6:.2f}M dense' in said
  )
  assert 'dense ones and experts, ' in said


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(targets='nothing'), "such as 'block_00/attention/key', got 'noth"),
    (
      dict(targets='norm'),
      "finds 'block_00/attention_norm/scale', which is no",
    ),
    (dict(targets='embed'), "finds 'embed/table', whose rows are looked up"),
    (
      dict(targets='moe/up', dropout=0.1),
      "dropout must be 0 with matrices of experts, and .* 'block_00/moe/up'",
    ),
    (dict(targets='moe/up', use_dora=True), 'use_dora must be False with'),
  ],
)
def test_targets_that_can_have_no_adapter_are_refused(fields, message):
  config = with_experts() if 'moe' in fields['targets'] else CONFIG
  config = lora(config, **fields)
  shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
  with pytest.raises(UserError, match=message):
    adapter_trees.targets(config.adapter, shapes)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(kind='lora', rank=0), 'rank must be positive, got 0'),
    (dict(kind='lora', dropout=1.0), 'dropout must be at least 0 and below 1'),
    (dict(kind='lora', targets='('), 'targets must be a regular expression'),
    (dict(kind='lora', name='../x'), 'name must be a plain name of a folder'),
    (dict(kind='qlora'), r"kind must be one of '' \(none\), lora, rows; got"),
    (dict(rank=8), "rank = 8 does nothing with kind = ''"),
  ],
)
def test_wrong_settings_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    AdapterConfig(**fields)


def test_an_adapter_needs_a_base_and_is_all_that_is_trained():
  adapter = AdapterConfig(kind='lora')
  with pytest.raises(UserError, match='start_from must name the workdir of th'):
    dataclasses.replace(CONFIG, adapter=adapter)
  trained = dataclasses.replace(CONFIG.optimizer, trained='mlp')
  with pytest.raises(UserError, match="trained = 'mlp' does nothing with adap"):
    dataclasses.replace(LORA, optimizer=trained)


def test_magnitudes_do_not_decay():
  leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  found = optimizer.labels({'query': dict(a=leaf, b=leaf, magnitude=leaf)})
  kinds = dict(a='decayed', b='decayed', magnitude='undecayed')
  assert found == {'query': kinds}
