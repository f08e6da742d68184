# SPDX-License-Identifier: Apache-2.0
"""The whole model: causality, packing, caches, placements, remat, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import payloads
from flax import traverse_util
from lanes import few
from parameters import draw, place

from jaxsparse import mesh
from jaxsparse.config import (
  DCMHAConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  RopeScalingConfig,
  SparseAttentionConfig,
)
from jaxsparse.config.errors import UserError
from jaxsparse.nn.transformer import Transformer, init_cache

# The programs run once: compiling them well would take most of the time.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)

KEY = jax.random.key(0)
B, T, V = 2, 7, 23


def make_config(placements=None, taps=0, **fields):
  """Two narrow blocks; grouped heads unless `fields` says otherwise."""
  memory = placements and MemoryConfig(
    num_keys=8,
    key_dim=4,
    num_selected=4,
    value_dim=8,
    query_conv_taps=taps,
    placements=placements,
  )
  sizes = dict(num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2)
  sizes |= dict(head_dim=4, mlp_dim=24, vocab_size=V, memory=memory)
  return ModelConfig(**(sizes | fields))


SPARSE = SparseAttentionConfig(
  block=2, tile=2, window_blocks=0, max_blocks=2, coverage_logit=0.5
)
MODELS = dict(
  pythia=make_config(
    num_layers=1, num_kv_heads=4, mlp='gelu_erf', tie_embeddings=False,
    norm='layer', bias='all', parallel_block=True, rope_fraction=0.5,
  ),
  qk_norm=make_config(qk_norm='head'),
  # As OLMo 2, Qwen2 and Llama 3.1 together.
  published=make_config(
    num_layers=1, norm_placement='post', qk_norm='projection', bias='qkv',
    rope_scaling=RopeScalingConfig(original_length=16),
  ),
  memory=make_config(((0, 1), (1, 1))),
  conv=make_config(((0, 2), (1, 1)), taps=3, num_layers=3),
  dcmha=make_config(
    attention_pattern=('local', 'global'),
    window=3,
    dcmha=DCMHAConfig(base=True),
  ),
  sparse=make_config(
    attention_pattern=('sparse', 'local'),
    window=3,
    sparse=SPARSE,
  ),
  joined=make_config(
    ((0, 1),),
    num_kv_heads=4,
    qk_norm='projection',
    attention_pattern=('local', 'sparse'),
    window=3,
    dcmha=DCMHAConfig(),
    sparse=SPARSE,
  ),
  experts=make_config(
    num_layers=1,
    mlp='gelu',
    moe=MoEConfig(
      num_experts=4, expert_dim=12, num_shared=1, bias_update_rate=1e-3
    ),
  ),
  memory_plus=dataclasses.replace(
    make_config(),
    memory=MemoryConfig.memory_plus(
      num_keys=8, key_dim=4, num_heads=2, num_selected=4, value_dim=16,
      shared_rows=64, placements=((1, 1),),
    ),
  ),
  peer=dataclasses.replace(
    make_config(),
    memory=MemoryConfig.peer(
      num_keys=8, key_dim=4, num_heads=2, num_selected=4, value_dim=16,
      pre_value_dim=16, placements=((0, 0),),
    ),
  ),
  v2=dataclasses.replace(
    make_config(),
    memory=MemoryConfig.ultramem_v2(
      num_keys=8, key_dim=4, num_selected=4, value_dim=8, pre_value_dim=4,
      shared_rows=100, placements=((0, 0), (1, 1)),
    ),
  ),
)  # fmt: skip
FEW = ['pythia', 'published', 'conv', 'joined', 'experts', 'v2']
all_models = pytest.mark.parametrize('name', few(FEW, MODELS))


@functools.cache
def make_params(config):
  return draw(Transformer(config).init, *one_document())


def one_document(seed=0, batch=B, length=T):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (batch, length), np.int32)
  positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
  return tokens, positions, np.ones_like(tokens)


@functools.cache
def jitted(config):
  """(params, tokens, positions, segment_ids, cache) -> logits, cache."""
  return jit(lambda *args: Transformer(config).apply(*args)[:2])


def logits_of(config, *inputs):
  return np.asarray(jitted(config)(make_params(config), *inputs, None)[0])


def test_scores_of_one_position_are_those_of_all():
  config = MODELS['qk_norm']
  params, inputs = make_params(config), one_document()
  at = np.arange(B, dtype=np.int32) * 3 % T
  expected = logits_of(config, *inputs)[np.arange(B), at]

  def scores(params, inputs, at):
    return Transformer(config).apply(params, *inputs, logits_at=at)[0]

  one = jit(scores)(params, inputs, at)
  np.testing.assert_allclose(one[:, 0], expected, rtol=1e-5, atol=1e-6)
  with jax.set_mesh(mesh.make_mesh(2, 1, 2, devices=jax.devices()[:4])):
    params = place(params, Transformer(config).init, *inputs)
    on_mesh = jit(scores)(params, inputs, at)
  np.testing.assert_allclose(on_mesh[:, 0], expected, rtol=1e-5, atol=1e-6)
  params, empty = make_params(config), [x[:, :0] for x in inputs]
  with pytest.raises(UserError, match='logits_at must have the shape'):
    jax.eval_shape(scores, params, inputs, at[:1])
  with pytest.raises(UserError, match='logits_at needs a position'):
    jax.eval_shape(scores, params, empty, at)


@all_models
def test_a_change_at_t_changes_nothing_before_t(name):
  config = MODELS[name]
  tokens, *rest = one_document()
  before = logits_of(config, tokens, *rest)
  changed = tokens.copy()
  changed[:, 4] = (changed[:, 4] + 1) % V
  after = logits_of(config, changed, *rest)
  # How a token's expert is multiplied depends on how many others it has, which
  # rounds differently.
  tolerance = 1e-5 if config.moe else 0
  np.testing.assert_allclose(
    before[:, :4], after[:, :4], rtol=0, atol=tolerance
  )
  assert np.all(np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-4)


@all_models
def test_packed_documents_see_nothing_of_each_other(name):
  config = MODELS[name]
  tokens, positions, segment_ids = one_document()
  expected = logits_of(config, tokens, positions, segment_ids)
  # 4 tokens of one document, 3 of the other; then padding around 4 of one. All
  # begin on the grid of sparse attention's blocks.
  segments = np.array([[1, 1, 1, 1, 2, 2, 2], [0, 0, 3, 3, 3, 3, 0]], np.int32)
  positions = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 0, 0, 1, 2, 3, 0]], np.int32)
  row = np.concatenate([tokens[0, :4], tokens[1, :3]])
  packed = logits_of(
    config, np.stack([row, np.roll(tokens[1], 2)]), positions, segments
  )
  np.testing.assert_allclose(packed[0, :4], expected[0, :4], atol=1e-5)
  np.testing.assert_allclose(packed[0, 4:], expected[1, :3], atol=1e-5)
  np.testing.assert_allclose(packed[1, 2:6], expected[1, :4], atol=1e-5)
  assert np.isfinite(packed).all()


# A family's decoding is that of `conv`, without its context.
@pytest.mark.parametrize('name', few(set(FEW) - {'v2'}, MODELS))
def test_decoding_equals_the_full_forward(name):
  """Ragged prompts, padded on the left: 4 and 2 tokens, then one by one."""
  config = MODELS[name]
  params, apply = make_params(config), jitted(config)
  tokens, positions, segment_ids = one_document()
  expected = logits_of(config, tokens, positions, segment_ids)
  starts = np.array([0, 2])
  prompt = np.stack([tokens[0, :4], np.roll(tokens[1], 2)[:4]])
  prompt_positions = np.maximum(np.arange(4) - starts[:, None], 0)
  prompt_segments = (np.arange(4) >= starts[:, None]).astype(np.int32)
  inputs = (prompt, prompt_positions.astype(np.int32), prompt_segments)
  cache = jit(functools.partial(init_cache, config, B, T + 2))()
  logits, cache = apply(params, *inputs, cache)
  np.testing.assert_allclose(logits[0], expected[0, :4], atol=1e-5)
  np.testing.assert_allclose(logits[1, 2:], expected[1, :2], atol=1e-5)
  for step in range(4, T):
    at = step - starts
    inputs = (tokens[[0, 1], at], at.astype(np.int32), np.ones(2, np.int32))
    logits, cache = apply(params, *(a[:, None] for a in inputs), cache)
    np.testing.assert_allclose(logits[:, 0], expected[[0, 1], at], atol=1e-5)
  assert cache['shared']['index'] == T


def captured(config, params):
  """What every module returned in one pass, by path."""
  _, state = jit(
    lambda params, *inputs: Transformer(config).apply(
      params, *inputs, capture_intermediates=True
    )
  )(params, *one_document())
  flat = traverse_util.flatten_dict(state['intermediates'], sep='/')
  return {path: jax.device_get(value[0]) for path, value in flat.items()}


@functools.cache
def streams(config):
  return captured(config, make_params(config))


def normalised(x, config, scale):
  mean_square = np.square(x).mean(-1, keepdims=True)
  return x / np.sqrt(mean_square + config.norm_epsilon) * scale


BOUNDED = dataclasses.replace(
  MODELS['sparse'],
  sparse=dataclasses.replace(MODELS['sparse'].sparse, history_blocks=2),
)


# A reshape of one sequence may take its dimension for another of length 1.
@pytest.mark.parametrize(
  ('name', 'sizes', 'batch'),
  few(
    [
      ('dcmha', (2, 1, 2), 2),
      ('sparse', (1, 1, 1), 1),
      ('bounded', (2, 1, 2), 2),
    ],
    [
      (name, *case)
      for name in ('dcmha', 'sparse', 'bounded')
      for case in (((1, 1, 1), 1), ((2, 1, 2), 2))
    ],
  ),
  ids=str,
)
def test_decoding_traces_on_a_mesh(name, sizes, batch):
  """Whatever the cache holds lies as new rows do; nothing is computed."""
  config = (MODELS | dict(bounded=BOUNDED))[name]
  devices = jax.sharding.AbstractMesh(
    sizes, mesh.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3
  )

  def prompt_and_token():
    inputs = [jnp.asarray(x) for x in one_document(batch=batch)]
    params = Transformer(config).init(KEY, *inputs)
    cache = init_cache(config, batch, 2 * T)
    _, cache, _ = Transformer(config).apply(params, *inputs, cache)
    last = [x[:, -1:] for x in inputs]
    logits, after, _ = Transformer(config).apply(params, *last, cache)
    return logits, cache, after

  with jax.sharding.use_abstract_mesh(devices):
    logits, cache, after = jax.eval_shape(prompt_and_token)
  assert logits.shape == (batch, 1, V)
  types = [
    [(x.shape, x.dtype, x.sharding.spec) for x in jax.tree.leaves(c)]
    for c in (cache, after)
  ]
  assert types[0] == types[1]


def test_same_block_placement_is_a_parallel_branch():
  config = MODELS['conv']
  seen = streams(config)
  params = make_params(config)['params']['block_02']
  middle = seen['block_00/__call__'][0] + seen['block_01/attention/__call__'][0]
  branches = ('block_01/mlp/__call__', 'block_01/memory/__call__')
  expected = middle + sum(seen[branch][0] for branch in branches)
  np.testing.assert_allclose(
    seen['block_02/attention_norm/__call__'],
    normalised(expected, config, params['attention_norm']['scale']),
    atol=1e-5,
  )


def test_a_memory_on_its_way_touches_no_block():
  """Golden check 8: with (0, 2), the inputs of blocks 1 and 2 stay as is."""
  with_memory = make_config(((0, 2),), num_layers=3)
  without = make_config(num_layers=3)
  params = make_params(with_memory)
  dense = {
    path: leaf
    for path, leaf in traverse_util.flatten_dict(params['params']).items()
    if 'memory' not in path
  }
  expected = captured(without, {'params': traverse_util.unflatten_dict(dense)})
  seen = streams(with_memory)
  arrives = [0.0, 0.0, seen['block_00/memory/__call__'][0]]
  for i, y in enumerate(arrives):
    path = f'block_0{i}/__call__'
    np.testing.assert_allclose(seen[path][0], expected[path][0] + y, atol=1e-5)


@pytest.mark.parametrize('name', few(['conv'], ['memory', 'conv']))
def test_two_memories_in_flight_land_where_they_should(name):
  config = MODELS[name]
  seen = streams(config)
  landed = dict.fromkeys(range(config.num_layers), 0.0)
  for read, write in config.memory.placements:
    landed[write] += seen[f'block_0{read}/memory/__call__'][0]
  x = seen['embed/__call__']
  for i in range(config.num_layers):
    attention, mlp = (
      seen[f'block_0{i}/{layer}/__call__'][0] for layer in ('attention', 'mlp')
    )
    x = x + attention + mlp + landed[i]
    np.testing.assert_allclose(seen[f'block_0{i}/__call__'][0], x, atol=1e-5)
  scale = make_params(config)['params']['final_norm']['scale']
  np.testing.assert_allclose(
    seen['final_norm/__call__'], normalised(x, config, scale), atol=1e-5
  )


def loss_and_gradients(config, params, batch=B):
  """With dropout; also the program, to see what remat does to it."""
  inputs = [jnp.asarray(array) for array in one_document(batch=batch)]

  def loss(params):
    logits, _, metrics = Transformer(config).apply(
      params, *inputs, deterministic=False, rngs=dict(dropout=KEY)
    )
    log_probs = jax.nn.log_softmax(logits)
    return jnp.square(log_probs).mean() / 10 + metrics['aux_loss'], metrics

  traced = jit(jax.value_and_grad(loss, has_aux=True)).trace(params)
  compiled = traced.lower().compile()
  (value, metrics), gradients = compiled(params)
  flat = traverse_util.flatten_dict(gradients['params'], sep='/')
  return float(value), metrics, flat, str(traced.jaxpr)


def assert_same_gradients(got, want):
  assert got.keys() == want.keys()
  for path in want:
    np.testing.assert_allclose(got[path], want[path], atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_remat_changes_the_program_but_no_number():
  config = dataclasses.replace(MODELS['memory'], dropout_rate=0.3)
  remat = dataclasses.replace(config, use_remat=True)
  params = make_params(MODELS['memory'])
  value, metrics, gradients, program = loss_and_gradients(config, params)
  again, remat_metrics, remat_gradients, remat_program = loss_and_gradients(
    remat, params
  )
  assert 'prevent_cse' not in program
  assert 'prevent_cse' in remat_program
  assert again == pytest.approx(value, abs=1e-5)
  assert metrics.keys() == remat_metrics.keys()
  assert 'block_00/memory/usage_kl' in metrics
  assert_same_gradients(remat_gradients, gradients)


def test_dropout_is_off_unless_asked_for():
  config = dataclasses.replace(MODELS['qk_norm'], dropout_rate=0.5)
  params, inputs = make_params(MODELS['qk_norm']), one_document()
  expected = logits_of(MODELS['qk_norm'], *inputs)

  @jit
  def both(*args):
    apply = Transformer(config).apply
    noisy = apply(*args, deterministic=False, rngs=dict(dropout=KEY))
    return apply(*args)[0], noisy[0]

  quiet, noisy = both(params, *inputs)
  np.testing.assert_allclose(quiet, expected, atol=1e-6)
  assert np.abs(noisy - expected).max() > 0.1


@pytest.fixture(scope='module')
def unsharded():
  config = make_config(
    ((0, 1), (1, 1)), taps=3, num_heads=8, num_kv_heads=4, dropout_rate=0.1
  )
  return config, *loss_and_gradients(config, make_params(config), 8)


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes',
  [(8, 1, 1), (2, 1, 4)],
  ids=str,
)
def test_any_mesh_gives_the_same_loss_and_gradients(unsharded, sizes):
  config, value, _, gradients, _ = unsharded
  whole = make_params(config)
  with jax.set_mesh(mesh.make_mesh(*sizes)):
    inputs = one_document(batch=8)
    params = place(whole, Transformer(config).init, *inputs)
    sharded, _, sharded_gradients, _ = loss_and_gradients(config, params, 8)
    query = jax.typeof(sharded_gradients['block_00/attention/query'])
    assert query.sharding.spec == mesh.param('DNH')
  assert sharded == pytest.approx(value, abs=1e-5)
  assert_same_gradients(sharded_gradients, gradients)


def test_a_memory_costs_no_collective_over_model():
  """Its output, split over `model` like the MLP's, joins that one's sum."""

  def sent(placements):
    config = make_config(placements, num_kv_heads=4)
    inputs = [jnp.asarray(array) for array in one_document(batch=2)]
    with jax.set_mesh(mesh.make_mesh(1, 1, 4, devices=jax.devices()[:4])):
      init = functools.partial(Transformer(config).init, KEY, *inputs)
      params = mesh.abstract(init, mesh=jax.sharding.get_mesh())
      forward = jax.jit(Transformer(config).apply)
      return payloads(forward.lower(params, *inputs).compile().as_text())

  sums = sent(None)
  assert [op for op, _, _ in sums] == 4 * ['all-reduce']
  assert sent(((0, 1), (1, 1))) == sums


@pytest.mark.parametrize(
  ('fields', 'batch', 'word'),
  [
    (dict(num_heads=6, num_kv_heads=2), 8, 'num_heads'),
    (dict(num_heads=4, num_kv_heads=2), 8, 'num_kv_heads'),
    (dict(num_kv_heads=4, mlp_dim=22), 8, 'mlp_dim'),
    (dict(num_kv_heads=4, model_dim=15), 8, 'model_dim'),
    (dict(num_kv_heads=4), 7, 'batch_size'),
    (dict(num_kv_heads=4, vocab_size=0), 8, 'vocab_size'),
  ],
)
def test_sizes_that_do_not_fit_are_named(fields, batch, word):
  inputs = one_document(batch=batch)
  with (
    jax.set_mesh(mesh.make_mesh(2, 1, 4)),
    pytest.raises(UserError, match=f'^{word} must') as caught,
  ):
    jax.eval_shape(Transformer(make_config(**fields)).init, KEY, *inputs)
  assert str(caught.value).count('.') == 1


def test_leaves_and_initial_scale():
  model, inputs = Transformer(MODELS['qk_norm']), one_document()
  (logits, *_), params = jit(model.init_with_output)(KEY, *inputs)
  params = params['params']
  assert set(params) == {'embed', 'final_norm', 'block_00', 'block_01'}
  names = {'attention_norm', 'attention', 'mlp_norm', 'mlp'}
  assert set(params['block_01']) == names
  assert logits.dtype == np.float32
  assert 0.5 < np.std(logits) < 3
