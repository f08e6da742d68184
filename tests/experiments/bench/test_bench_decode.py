# SPDX-License-Identifier: Apache-2.0
"""The decode bench on tiny sizes: equal budgets, whole cells, its one rule."""

import argparse
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.analysis import cost
from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import (
  command,
  decode,
  decode_cell,
  decode_models,
  decode_program,
)
from jaxsparse.nn.transformer import Transformer

TINY = dict(
  context=24, steps=3, rounds=1, batches='2', kv_groups='2', model_dim=32,
  layers=3, heads=2, mlp_dim=128, vocab=64, growth=4, selected=4,
  width_multiple=1, margin=1e9,
)  # fmt: skip


def _options(**changes):
  return argparse.Namespace(**decode.OPTIONS | TINY | changes)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  path = tmp_path_factory.mktemp('decode') / 'decode.json'
  flags = TINY | dict(models=','.join(decode_models.NAMES))
  command.main(
    ['decode', f'--json={path}', *(f'--{n}={v}' for n, v in flags.items())]
  )
  return json.loads(path.read_text())


@pytest.mark.slow
def test_all_models_have_a_complete_record(report):
  records = report['results']
  assert [r['contender'] for r in records] == list(decode_models.NAMES)
  assert report['arguments']['steps'] == TINY['steps']
  for r in records:
    assert r['seconds'] > 0
    assert r['bytes_per_second'] == r['least_bytes'] / r['seconds']
    assert r['share_of_copy'] == r['bytes_per_second'] / 1e9
    parts = [r[f'{n}_bytes'] for n in ('weights', 'experts', 'values', 'cache')]
    assert r['least_bytes'] == sum(parts)
  of = {r['contender']: r for r in records}
  for name, r in of.items():
    assert r['to_dense'] == r['seconds'] / of['dense']['seconds']
    assert r['moe_ratio'] == of['moe']['seconds'] / r['seconds']
    assert r['moe_limit'] == of['moe']['least_bytes'] / r['least_bytes']
    assert (r['distinct_per_layer'] > 0) == (name != 'dense')
  # Two tokens choose two experts each.
  assert 2 <= of['moe']['distinct_per_layer'] <= 4


@pytest.mark.parametrize(
  ('group', 'family'),
  few(
    [(8, 'own')],
    itertools.product([1, 4, 8], decode_models.FAMILIES),
  ),
)
def test_models_are_at_equal_budgets(family, group):
  options = argparse.Namespace(
    **decode.OPTIONS | dict(family=family, models=','.join(decode_models.NAMES))
  )
  models = decode_models.make_models(options, group)
  flops = [cost.forward_flops(m, options.context) for m in models.values()]
  assert max(flops) / min(flops) < 1.02
  totals = [
    cost.count_parameters(m).published
    for name, m in models.items()
    if name != 'dense'
  ]
  assert max(totals) / min(totals) < 1.03
  attention = {
    (m.num_layers, m.model_dim, m.num_heads, m.num_kv_heads, m.vocab_size)
    for m in models.values()
  }
  assert len(attention) == 1
  assert models['dense'].num_heads == group * models['dense'].num_kv_heads


def test_the_family_of_680m_is_the_published_one(monkeypatch, tmp_path):
  # Wherever it is started.
  monkeypatch.chdir(tmp_path)
  options = argparse.Namespace(
    **decode.OPTIONS | dict(family='680m', models='moe,ultramem')
  )
  models = decode_models.make_models(options, 1)
  ultramem = models['ultramem']
  np.testing.assert_allclose(ultramem.memory.num_keys, 1632, rtol=0.01)
  np.testing.assert_allclose(ultramem.mlp_dim, 6144, rtol=0.01)
  assert models['moe'].moe.num_experts in (32, 33, 34)
  np.testing.assert_allclose(models['moe'].moe.expert_dim, 3584, rtol=0.02)
  published = cost.count_parameters(ultramem).published
  np.testing.assert_allclose(published, 8.93e9, rtol=0.01)


@pytest.mark.parametrize('name', few(['ultramem'], ['dense', 'ultramem']))
def test_the_cache_stays_in_place(name):
  options = _options(context=512, models=name)
  model = decode_models.make_models(options, 1)[name]
  cell = decode_cell.Cell(
    {name: model}, {name: decode_models.draw_params(model)}, options, 16,
  )  # fmt: skip
  memory = cell._programs[name].memory_analysis()
  cache = (cell._keys, cell._contexts[name])
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
  keys = cell._keys['blocks']['block_00']['attention']['key']
  # All but the index, which the program sets.
  assert memory.alias_size_in_bytes >= num_bytes - 4
  # Nothing of it is transposed, not even a layer at a time.
  assert memory.temp_size_in_bytes < 0.1 * num_bytes
  cell.take_turns('uniform')
  assert keys.is_deleted()


@pytest.mark.slow
def test_steps_are_those_of_the_model():
  options = _options(models='ultramem')
  model = decode_models.make_models(options, 2)['ultramem']
  params = decode_models.draw_params(model)
  length = options.context + options.steps
  tokens = decode_program.draw_tokens(
    'zipf', options.steps, 2, model.vocab_size
  )
  cache = decode_program.fill_cache(model, 2, length)
  expected, joined = [], decode_program.join(*cache)
  joined['shared']['index'] = jnp.int32(options.context)
  apply = jax.jit(Transformer(model).apply)
  for i, token in enumerate(tokens):
    position = jnp.full((2, 1), options.context + i)
    logits, joined, _ = apply(
      {'params': params}, token[:, None], position, position**0, joined
    )
    expected.append(logits[:, -1].argmax(-1))
  program = decode_program.lower_decode(
    model, params, cache, tokens, options.context
  ).compile()
  _, drawn, picks = program(params, cache, tokens)
  np.testing.assert_array_equal(drawn, np.stack(expected))
  layers = len(model.memory.placements)
  assert picks.shape == (options.steps, layers, 2, 2 * options.selected)


@pytest.mark.parametrize('batch_size', few([8], [1, 8]))
def test_no_step_casts_all_experts(batch_size):
  """In bf16 a copy in f32 would be twice what the baseline must read."""
  options = _options(models='moe', dtype='bfloat16')
  model = decode_models.make_models(options, 1)['moe']
  params = jax.eval_shape(lambda: decode_models.draw_params(model))
  cache = jax.eval_shape(
    lambda: decode_program.fill_cache(model, batch_size, 8)
  )
  tokens = decode_program.draw_tokens(
    'uniform', 2, batch_size, model.vocab_size
  )
  text = decode_program.lower_decode(model, params, cache, tokens, 6).as_text()
  up = 'x'.join(map(str, params['block_00']['moe']['up'].shape))
  assert f'tensor<{up}xbf16>' in text
  assert f'tensor<{up}xf32>' not in text


def test_tokens_of_zipf_repeat():
  uniform, zipf = (
    decode_program.draw_tokens(kind, 10, 64, 4096)
    for kind in ('uniform', 'zipf')
  )
  assert len(np.unique(zipf)) < 0.8 * len(np.unique(uniform))


def test_least_bytes_count_what_was_read():
  models = decode_models.make_models(_options(models='moe,ultramem_v2'), 1)
  moe, memory = models['moe'], models['ultramem_v2']
  every = float(moe.num_layers * moe.moe.num_experts)
  assert decode_cell.least_bytes(moe, 1, 24, every) == cost.decode_bytes(
    moe, 10**6, 24, bytes_per_value=4
  ).__class__(
    **dataclasses.asdict(cost.decode_bytes(moe, 1, 24, bytes_per_value=4))
    | dict(experts=4.0 * cost.count_parameters(moe).experts)
  )
  least = decode_cell.least_bytes(memory, 1, 24, 10.0)
  assert least.values == 4 * 10 * (8 + 8)
  half = dataclasses.replace(memory, dtype='bfloat16')
  of_half = decode_cell.least_bytes(half, 1, 24, 10.0)
  assert of_half.weights == least.weights / 2
  # Tables have a type of their own.
  assert of_half.values == least.values


def test_distinct_are_counted_by_layer():
  picks = np.array([[[[1, 2], [2, 3]], [[1, 1], [1, 1]]]] * 2)
  assert decode_cell.count_distinct(picks) == 4
  assert decode_cell.count_distinct(np.zeros((3, 0, 1, 1))) == 0


def _rigged(moe_seconds):
  def record(name, seconds, least_bytes):
    return dict(
      task='cell', contender=name, seconds=seconds, least_bytes=least_bytes,
      bytes_per_second=1.0, share_of_copy=1.0, distinct_per_layer=1.0,
    )  # fmt: skip

  return decode_cell.with_ratios(
    [
      record('dense', 1.0, 100),
      record('moe', moe_seconds, 400),
      record('ultramem', 1.0, 100),
    ]
  )


def test_a_ratio_above_the_limit_is_refused():
  decode.refuse_impossible(_rigged(4.3), 0.1)
  with pytest.raises(UserError, match=r'takes 4\.50 times .* only 4\.00 times'):
    decode.refuse_impossible(_rigged(4.5), 0.1)


@pytest.mark.parametrize(
  ('moe_seconds', 'num_measured', 'is_refused'),
  [([4.0], 1, False), ([4.5, 4.3], 2, False), ([4.5] * 9, 3, True)],
)
def test_a_cell_above_the_limit_is_measured_again(
  moe_seconds, num_measured, is_refused
):
  class BusyCell:
    def __init__(self):
      self.measured = []

    def take_turns(self, routing):
      return moe_seconds[len(self.measured)]

    def records(self, task, seconds):
      self.measured.append(seconds)
      return _rigged(seconds)

  cell = BusyCell()
  rows, error = decode.measure_cell(cell, 'uniform', 'cell', 0.1)
  assert len(cell.measured) == num_measured
  assert (error is not None) == is_refused
  assert rows == _rigged(cell.measured[-1])


@pytest.mark.parametrize(
  ('option', 'value'),
  [
    ('models', 'dense,sparse'),
    ('family', '7b'),
    ('batches', '1,x'),
    ('batches', '0'),
    ('kv_groups', '3'),
    ('routing', 'even'),
    ('steps', 0),
    ('layers', 2),
  ],
)
def test_bad_options_are_refused(option, value, monkeypatch):
  # To free the programs of all tests before takes seconds.
  monkeypatch.setattr(jax, 'clear_caches', lambda: None)
  with pytest.raises(UserError, match=option):
    list(decode.measure(_options(**{option: value})))
