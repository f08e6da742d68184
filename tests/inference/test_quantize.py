# SPDX-License-Identifier: Apache-2.0
"""A quantized model is the model of its numbers, whatever reads it."""

import functools

import jax
import numpy as np
import pytest
from lanes import few
from parameters import place
from slot_models import MODELS, V, make_params

from jaxsparse import mesh as mesh_lib
from jaxsparse.config.errors import UserError
from jaxsparse.inference import quantize as quantize_lib
from jaxsparse.inference.quantize import Quantization, dequantized, quantize
from jaxsparse.nn.parameter import is_quantized
from jaxsparse.nn.transformer import Transformer, init_cache

B, LENGTH = 2, 7

FOUR_BITS = Quantization(weights='int4', tables='int4', group=32)
TABLES = Quantization(tables='int8')
MIXED = Quantization(weights='nf4', tables='int8', group=64)
EIGHT_BITS = Quantization(weights='int8', tables='int8')

# By one program of all leaves.
numbers_of = jax.jit(dequantized)


def tokens(batch_size=B, length=LENGTH):
  rng = np.random.default_rng(0)
  return jax.device_put(rng.integers(0, V, (batch_size, length), np.int32))


@functools.cache
def params_of(name):
  return jax.device_put(make_params(MODELS[name])['params'])


def close(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  bound = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def in_slots(config):
  """Logits of a prompt and of tokens after it, which slots hold by turns."""
  apply = jax.jit(
    lambda *args: Transformer(config).apply(*args)[:2],
    compiler_options={
      'xla_backend_optimization_level': 0,
      'xla_llvm_disable_expensive_passes': True,
    },
  )

  def run(params):
    cache = init_cache(config, B, LENGTH, has_slots=True)
    fed, logits, done = np.asarray(tokens()), [], np.zeros(B, np.int32)
    # The second waits while the first goes on, and is late then.
    for count in ([4, 3], [1, 0], [1, 1], [0, 1]):
      at = done[:, None] + np.arange(max(count), dtype=np.int32)
      is_live = np.arange(max(count)) < np.array(count)[:, None]
      inputs = np.take_along_axis(fed, at, axis=1), at, is_live.astype(np.int32)
      out, cache = apply({'params': params}, *inputs, cache)
      logits += np.asarray(out)[is_live].tolist()
      done += np.array(count, np.int32)
    return np.array(logits)

  return run


@pytest.mark.parametrize(
  ('name', 'how'),
  few(
    [('small', FOUR_BITS)],
    [(name, how) for name in MODELS for how in (FOUR_BITS, MIXED, EIGHT_BITS)],
  ),
)
def test_slots_decode_as_with_the_numbers(name, how):
  config = MODELS[name]
  params = quantize(config, params_of(name), how)
  run = in_slots(config)
  numbers = run(numbers_of(params))
  close(run(params), numbers)
  # It is another model than the one it is from.
  assert np.abs(numbers - run(params_of(name))).max() > 1e-4


def logits_of(config, inputs, *axes):
  return jax.jit(
    lambda p: Transformer(config, *axes).apply({'params': p}, inputs)[0]
  )


@pytest.mark.parametrize('name', few(['small'], MODELS))
def test_on_a_mesh_too(name):
  config, inputs = MODELS[name], tokens(8)
  how = Quantization(weights='int4', tables='int8')
  params, one = params_of(name), np.ones((8, 2), np.int32)
  with jax.set_mesh(mesh_lib.make_mesh(2, 2, 2)):
    params = place({'params': params}, Transformer(config).init, one, one, one)[
      'params'
    ]
    split = quantize(config, params, how)
    found = logits_of(config, inputs)(split)
    whole = numbers_of(split)
  whole = jax.device_put(jax.device_get(whole))
  close(found, logits_of(config, inputs)(whole))


@pytest.mark.parametrize('name', few(['small'], MODELS))
def test_on_the_mesh_of_a_guest_too(name):
  """Whose columns cut no row between its parts, and no group of a matrix."""
  config, inputs = MODELS[name], tokens(4)
  how = Quantization(weights='int4', tables='int4')
  params = quantize(config, params_of(name), how)
  expected = logits_of(config, inputs)(numbers_of(params))
  axes = mesh_lib.Axes(batch=('host',), columns=('chip',))
  with jax.set_mesh(jax.make_mesh((4, 2), ('host', 'chip'))):
    placed = jax.device_put((params, inputs), jax.P())
    found = logits_of(config, placed[1], axes)(placed[0])
  close(found, expected)


def leaves(params):
  found = {}
  quantize_lib.map_leaves(
    lambda path, x: found.update({'/'.join(path): x}), params
  )
  return found


def test_what_chooses_stays_as_it_is():
  for name in ('v2', 'moe', 'dcmha', 'indexed', 'memory_plus'):
    before = leaves(params_of(name))
    after = leaves(quantize(MODELS[name], params_of(name), FOUR_BITS))
    exact = {path for path, x in after.items() if not is_quantized(x)}
    words = ('norm', 'router', 'keys', 'cores', 'memory/query', 'scale',
             'dcmha', 'sparse', 'query_conv')  # fmt: skip
    assert all(any(word in path for word in words) for path in exact), exact
    assert all(after[path] is before[path] for path in exact)
    assert after['embed/table'].kind == 'int8'


def test_retrieval_is_the_same_when_tables_alone_are_quantized():
  config = MODELS['convolved']

  @jax.jit
  def slots(params):
    _, state = Transformer(config).apply(
      {'params': params}, tokens(), mutable=['intermediates']
    )
    return state['intermediates']['block_00']['memory']['slots'][0]

  params = quantize(config, params_of('convolved'), TABLES)
  np.testing.assert_array_equal(slots(params), slots(params_of('convolved')))


def test_quantized_leaves_are_arguments_of_a_program():
  """Were they constants, the program would grow with them."""
  config = MODELS['v2']
  params = quantize(config, params_of('v2'), FOUR_BITS)
  lowered = jax.jit(
    lambda p: Transformer(config).apply({'params': p}, tokens())[0]
  ).lower(params)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert 'dense_resource' not in lowered.as_text()
  memory = lowered.compile().memory_analysis()
  assert memory.argument_size_in_bytes >= 0.9 * size


def test_bytes_by_part_add_up():
  params = params_of('v2')
  before = quantize_lib.bytes_by_part(params)
  after = quantize_lib.bytes_by_part(quantize(MODELS['v2'], params, EIGHT_BITS))
  assert sum(before.values()) == sum(x.nbytes for x in jax.tree.leaves(params))
  assert before.keys() == after.keys() >= {'tables', 'attention', 'MLPs'}
  assert after['attention'] < 0.5 * before['attention']


def test_what_a_flag_says():
  assert quantize_lib.parse('') == Quantization()
  assert quantize_lib.parse(
    'weights=int4,group=64,tables=int4,clip_search=true'
  ) == Quantization(weights='int4', group=64, tables='int4', clip_search=True)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('weight=int8', "no 'weight'.* weights.*written as"),
    ('int8', "--quantize has no 'int8'; it is written as"),
    ('weights=int3', "weights must be one of int8, int4, nf4, .* got 'int3'"),
    ('tables=nf4', 'tables must be one of int8, int4, float8'),
    ('group=48', 'group must be 32 or 64, got 48'),
    ('clip_search=yes', "clip_search must be true or false, got 'yes'"),
    ('tables=int8,clip_search=true', 'clip_search is for tables=int4, got'),
  ],
)
def test_a_wrong_flag_is_one_sentence(text, message):
  with pytest.raises(UserError, match=message):
    quantize_lib.parse(text)


def test_a_wrong_field_is_named():
  for text, message in (
    ('weight=nf4', r'^adapter\.quantize has no'),
    ('weights=nf5', r'^adapter\.quantize: weights must be one of int8, int4'),
    ('group=7', r'^adapter\.quantize: group must be 32 or 64, got 7'),
    ('clip_search=1', r'^adapter\.quantize: clip_search must be true or'),
  ):
    with pytest.raises(UserError, match=message):
      quantize_lib.parse(text, 'adapter.quantize')


def test_a_quantized_model_is_not_quantized_again():
  params = quantize(MODELS['small'], params_of('small'), TABLES)
  with pytest.raises(UserError, match='value_table is quantized already'):
    quantize(MODELS['small'], params, EIGHT_BITS)
