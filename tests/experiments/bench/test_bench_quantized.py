# SPDX-License-Identifier: Apache-2.0
"""Benches of quantized models: bytes, forms, and what is lost by them."""

import argparse
import functools
import itertools
import math
import time

import jax
import numpy as np
import pytest
from parameters import draw

from jaxsparse.config import Config, DataConfig, MemoryConfig, ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import facts
from jaxsparse.data.tokenizer import ByteTokenizer, load_from_workdir
from jaxsparse.evaluation.scorer import Scorer
from jaxsparse.experiments.bench import (
  measuring,
  quantized,
  quantized_forms,
  quantized_loss,
)
from jaxsparse.experiments.compare import recall
from jaxsparse.inference.quantize import dequantized, parse, quantize
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import new_workdir

SMALL = dict(
  rows=11, width=32, tokens=3, entries=2, size=64, batches='',
  decode_batches='', rounds=1,
)  # fmt: skip
MODEL = ModelConfig(
  num_layers=1,
  model_dim=32,
  num_heads=2,
  num_kv_heads=2,
  head_dim=16,
  mlp_dim=32,
  vocab_size=257,
  memory=MemoryConfig(
    num_keys=8, key_dim=4, num_selected=4, value_dim=16, placements=((0, 0),)
  ),
)
WINDOW = 16
TEXT = 'What is read again is read in the same way. ' * 3


def options(bench, **changes):
  return argparse.Namespace(**bench.OPTIONS | changes)


@pytest.fixture(scope='module')
def params():
  tokens = np.zeros((1, 2), np.int32)
  drawn = draw(Transformer(MODEL).init, tokens, tokens, tokens)
  return jax.device_put(drawn['params'])


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, params):
  path = tmp_path_factory.mktemp('runs') / 'small'
  new_workdir.require_new(path)
  config = Config(model=MODEL, data=DataConfig(seq_len=WINDOW))
  ByteTokenizer().save(path)
  new_workdir.write(path, config, params, dict(test='bench'))
  return path


@pytest.fixture(scope='module')
def text(workdir):
  path = workdir.parent / 'text.txt'
  path.write_text(TEXT)
  return path


def sizes(bench):
  found = list(quantized.measure(bench))
  assert all(r['seconds'] > 0 for r in found)
  return {(r['task'].split()[0], r['contender']): r['bytes'] for r in found}


def test_bytes_of_tables_are_of_what_is_stored():
  row = dict(f32=128, bf16=64, int8=48, int4=32, float8=48)
  expected = {('bag', name): 11 * size for name, size in row.items()}
  assert sizes(options(quantized, **SMALL)) == expected


def test_a_busy_machine_counts_in_the_median_alone():
  waits = itertools.cycle([0, 0, 0, 0.05, 0.03])
  busy = measuring.Contender(lambda: time.sleep(next(waits)), lambda _: None)
  least = measuring.take_turns({'busy': busy}, 3, least=True)['busy']
  median = measuring.take_turns({'busy': busy}, 3)['busy']
  assert least < 0.03 <= median


@pytest.mark.slow
def test_bytes_of_matrices_are_of_what_is_stored():
  found = sizes(options(quantized, **SMALL | dict(batches='2')))
  assert {name: n for (task, name), n in found.items() if task != 'bag'} == {
    'f32': 4 * 64**2,
    'int8': 64**2 + 4 * 64,
    'int4, groups of 32': 64**2 // 2 + 4 * 2 * 64,
    'int4, groups of 64': 64**2 // 2 + 4 * 64,
    'nf4, groups of 64': 64**2 // 2 + 4 * 64,
  }


@pytest.mark.slow
def test_all_forms_of_a_model_decode():
  changes = dict(
    decode_batches='2', model_dim=32, layers=3, mlp_dim=32, context=4
  )
  bench = options(quantized, **SMALL | changes)
  found = [r for r in quantized.measure(bench) if 'decode' in r['task']]
  assert [r['contender'] for r in found] == list(quantized.MODELS)
  size = {r['contender']: r['bytes'] for r in found}
  assert size['both int4'] < size['tables int4'] < size['tables int8']
  assert size['tables int8'] < size['f32']


def test_numbers_of_batches_are_checked():
  with pytest.raises(UserError, match='batches must be positive'):
    list(quantized.measure(options(quantized, batches='1,x')))


def test_losses_are_those_of_the_numbers(workdir, text, params):
  forms = ['tables int4', 'tables zero']
  bench = options(
    quantized_loss, workdir=str(workdir), text=str(text), forms=','.join(forms)
  )
  first, *found = quantized_loss.measure(bench)
  assert [first['form'], *(r['form'] for r in found)] == ['f32', *forms]
  tokenizer = load_from_workdir(workdir)
  int4 = dequantized(quantize(MODEL, params, parse('tables=int4')))
  for record, of in ((first, params), (found[0], int4)):
    (nats,) = Scorer(MODEL, of, tokenizer, WINDOW).rolling([TEXT])
    bits = -nats / math.log(2) / len(TEXT)
    np.testing.assert_allclose(record['bits_per_byte'], bits, rtol=1e-5)
  for record in found:
    lost = record['bits_per_byte'] - first['bits_per_byte']
    np.testing.assert_allclose(record['lost'], lost, rtol=0, atol=1e-9)
    assert record['lost_stderr'] > 0
    assert record['dense_bytes'] == first['dense_bytes']
  assert [r['table_bytes'] for r in found] == [64 * 16, 0]


def test_of_several_models_means_are_told(workdir, text):
  """And recall, of who has no facts."""
  bench = options(
    quantized_loss,
    workdir=f'{workdir},{workdir}',
    text=str(text),
    forms='tables int4',
    people=1,
  )
  of_two = list(quantized_loss.measure(bench))
  bench.workdir = str(workdir)
  for one, two in zip(quantized_loss.measure(bench), of_two, strict=True):
    assert two['lost_by_model'] == [one['lost']] * 2
    assert math.isclose(two['lost'], one['lost'], abs_tol=1e-12)
    share = one['lost_stderr'] / math.sqrt(2)
    assert math.isclose(two['lost_stderr'], share, abs_tol=1e-12)
    assert 0 <= one['recall'] <= 1
    assert two['recall_by_model'] == [one['recall']] * 2


def test_facts_are_recalled_by_a_cache_as_well(params):
  people = facts.make_people(1, 0)
  by_model, by_cache = (
    recall.measure(
      functools.partial(logits, MODEL, params), ByteTokenizer(), people
    )
    for logits in (recall._logits, quantized_loss._forward_by_cache)
  )
  assert math.isclose(by_model.bits, by_cache.bits, rel_tol=1e-2)


@pytest.mark.slow
def test_all_forms_of_a_model_are_scored(workdir, text):
  files = dict.fromkeys(('text', 'calibrate'), str(text))
  bench = options(quantized_loss, workdir=str(workdir), **files)
  found = {r['form']: r for r in quantized_loss.measure(bench)}
  assert list(found) == list(quantized_forms.FORMS)
  tables, dense = (
    {name: r[f'{part}_bytes'] for name, r in found.items()}
    for part in ('table', 'dense')
  )
  assert tables['tables 1 bit'] == 64 * 6
  assert tables['tables 3 bits'] == 64 * 10
  assert tables['tables int8'] == tables['both int8'] == 64 * 32
  assert dense['both int4'] == dense['dense int4 GPTQ'] < dense['dense int8']
  assert dense['tables int8'] == dense['f32'] > dense['dense int8']
  plain, by_text = (
    found[name]['bits_per_byte'] for name in ('dense int4', 'dense int4 GPTQ')
  )
  assert plain != by_text
  assert 0 < abs(found['KV int8']['lost']) < 0.1


def test_fakes_have_as_many_numbers_as_their_bits():
  rows = np.random.default_rng(0).standard_normal((5, 16), np.float32)
  rows[3] = 0
  for fake, most in (
    (quantized_forms.three_bits, 7),
    (quantized_forms.one_bit, 2),
  ):
    numbers, _ = fake(rows)
    assert all(len(np.unique(row)) <= most for row in numbers)
    assert np.abs(numbers[3]).max() == 0
    assert np.abs(numbers - rows).max() < np.abs(rows).max()


def test_an_aim_is_met_or_missed_beyond_the_error():
  record = dict(form='tables int4', lost_stderr=0.001)
  verdicts = [
    quantized_loss.verdict(record | dict(lost=lost))
    for lost in (-0.001, 0.001, 0.003, 0.005)
  ]
  assert verdicts[0] == 'met'
  assert verdicts[1] == verdicts[2] == 'met or not, within the error'
  assert verdicts[3] == 'missed'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(), '--workdir must name'),
    (dict(workdir='runs', forms='tables int2'), "got 'tables int2'"),
    (dict(workdir='runs', bytes=0), 'bytes must be at least 1'),
  ],
)
def test_losses_refuse(changes, message):
  with pytest.raises(UserError, match=message):
    list(quantized_loss.measure(options(quantized_loss, **changes)))
