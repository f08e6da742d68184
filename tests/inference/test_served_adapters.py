# SPDX-License-Identifier: Apache-2.0
"""Sequences of one batch that have different adapters, or none."""

import dataclasses
import functools
import time

import numpy as np
import pytest
from adapter_folders import write_lora, write_rows
from lanes import few
from slot_models import MODELS
from small_run import draw_params, save_untrained
from told import Told

from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.inference import served_adapters, weights
from jaxsparse.inference.engine import Engine
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.jobs import Job, JobSampling
from jaxsparse.inference.served_adapters import NoPlace, parse
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.run import stored

MODEL = dataclasses.replace(MODELS['small'], vocab_size=257)
ALL = '(attention|mlp|memory)/(query|key|value|output|gate|up|down)$'
CHUNK, LENGTH, NUM_SLOTS = 8, 32, 4
# Three chunks, the last one shorter.
PROMPT = tuple(range(60, 60 + 2 * CHUNK + 3))
NAMES = ('', 'queries', 'facts', 'everything')


@functools.cache
def drawn():
  return draw_params(MODEL, 0.3)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp('base')
  return save_untrained(folder, MODEL, deviation=0.3)


@pytest.fixture(scope='module')
def folders(base):
  params = drawn()
  return dict(
    queries=write_lora(base, params, 'queries', rank=2, alpha=3.0),
    facts=write_rows(base, params, 'facts'),
    everything=write_lora(base, params, 'everything', 1, rank=3, targets=ALL),
  )


def read(base, folders, name, is_forced=False, params=None):
  shapes = served_adapters.shapes_of(params or drawn())
  fingerprint = stored.params_fingerprint(base, 3)
  return served_adapters.read(
    name, folders[name], shapes, fingerprint, is_forced
  )


def programs_of(params, places=None):
  return Programs.compile(
    MODEL, params, NUM_SLOTS, LENGTH, (CHUNK,), is_lazy=True, places=places
  )


def with_places(base, folders, how=None):
  _, params = weights.load(base, MODEL, how=how)
  given = [read(base, folders, name) for name in folders]
  params, places = served_adapters.with_places(params, given, MODEL.dtype)
  # As the server does: what has no adapter is folded.
  return fold_for_decode(MODEL, params), places


@pytest.fixture(scope='module')
def programs(base, folders):
  return programs_of(*with_places(base, folders))


def started(programs, **options):
  engine = Engine(lambda tell: programs, ByteTokenizer(), **options)
  engine.start()
  while engine.state == 'starting':
    time.sleep(0.01)
  return engine


@pytest.fixture
def engine(programs):
  found = started(programs, prefix_bytes=1 << 20)
  yield found
  assert found.drain(60)


def job_of(name, tag=''):
  return Job(
    id=f'{name} {tag}',
    tokens=PROMPT,
    max_tokens=6,
    sampling=JobSampling(temperature=0.0, ignore_eos=True),
    num_logprobs=0,
    adapter=name,
  )


def run(engine, jobs):
  """Tokens and log-probabilities of each job, and what it had been read."""
  told = Told()
  engine.submit_all(jobs, told)
  found = []
  for job in jobs:
    events = told.wait(job.id)
    assert events[-1].finish == 'length', events[-1].error
    logprobs = [x.logprob for x in told.logprobs(job.id)]
    cached = max(event.num_cached for event in events)
    found.append((told.tokens(job.id), np.array(logprobs), cached))
  return found


def close(found, expected, atol=1e-6):
  for (tokens, logprobs, _), (of_other, others, _) in zip(
    found, expected, strict=True
  ):
    assert tokens == of_other
    np.testing.assert_allclose(logprobs, others, atol=atol, rtol=0)


def num_different(found):
  return len({tuple(np.round(logprobs, 4)) for _, logprobs, _ in found})


def test_a_batch_of_several_is_several_batches(engine):
  """Prompts in chunks, decoded with a cache, and once more by their prefix."""
  together = run(engine, [job_of(name) for name in NAMES])
  assert [cached for _, _, cached in together] == [0, 0, 0, 0]
  assert num_different(together) == len(NAMES)
  alone = [run(engine, [job_of(name, 'alone')])[0] for name in NAMES]
  close(alone, together)
  # What has been read with one is of no use to the others.
  assert [cached for _, _, cached in alone] == [2 * CHUNK] * len(NAMES)
  again = run(engine, [job_of(name, 'again') for name in reversed(NAMES)])
  close(again[::-1], together)


@pytest.mark.parametrize('name', few(['', 'everything'], NAMES))
def test_each_is_the_model_with_that_adapter_alone(base, folders, engine, name):
  (found,) = run(engine, [job_of(name)])
  given = [folders[name]] if name else []
  _, params = weights.load(base, MODEL, adapters=given)
  alone = started(programs_of(params))
  job = dataclasses.replace(job_of(name), adapter='')
  close([found], run(alone, [job]), 1e-5)
  assert alone.drain(60)


def test_one_is_read_again_without_another_program(
  base, folders, engine, programs
):
  before, _ = run(engine, [job_of('queries'), job_of('')])
  num_compiled = programs.num_compiled
  params = drawn()
  try:
    write_lora(base, params, 'queries', 5, rank=1)
    engine.put_adapter(read(base, folders, 'queries')).result(10)
    (after,) = run(engine, [job_of('queries', 'changed')])
    assert num_different([before, after]) == 2
    # Nothing that was read with the former is taken.
    assert after[2] == 0
    (unchanged,) = run(engine, [job_of('', 'unchanged')])
    assert unchanged[2] == 2 * CHUNK
  finally:
    write_lora(base, params, 'queries', rank=2, alpha=3.0)
  engine.put_adapter(read(base, folders, 'queries')).result(10)
  close(run(engine, [job_of('queries', 'back')]), [before])
  assert programs.num_compiled == num_compiled
  with pytest.raises(UserError, match='there is no adapter'):
    engine.submit(job_of('unknown'), Told())


def test_who_writes_with_the_former_goes_on_with_it(base, folders):
  params, places = with_places(base, folders)
  first, version = places.enter('facts')
  facts = read(base, folders, 'facts')
  params = places.put(params, facts)
  second, _ = places.enter('facts')
  assert first != second
  with pytest.raises(NoPlace, match='texts are still being written'):
    places.put(params, facts)
  places.leave(first)
  params = places.put(params, facts)
  assert places.enter('facts') == (first, version)
  # The rows are there, and only in its places.
  table = params['block_00']['memory']['value_table']
  has_rows = np.asarray(table.rows[:, 0]) < len(table)
  assert np.flatnonzero(has_rows).tolist() == sorted((first, second))


@pytest.mark.slow
def test_beside_a_quantized_model(base, folders):
  from jaxsparse.inference.quantize import parse as parse_how

  how = parse_how('weights=int8,tables=int8')
  params, places = with_places(base, folders, how)
  engine = started(programs_of(params, places))
  together = run(engine, [job_of(name) for name in NAMES])
  assert engine.drain(60)
  for name, found in zip(NAMES[:1], together[:1], strict=True):
    _, alone = weights.load(base, MODEL, how=how)
    engine = started(programs_of(alone))
    close([found], run(engine, [job_of(name)]))
    assert engine.drain(60)
  assert num_different(together) == len(NAMES)


def test_what_can_not_be_served(base, folders, tmp_path):
  params = drawn()
  other = tmp_path / 'other'
  other.mkdir()
  save_untrained(other, MODEL, deviation=0.1)
  wrong = dict(folders) | dict(
    other=write_lora(other, params, 'other'),
    dora=write_lora(base, params, 'dora', use_dora=True),
    nothing=str(tmp_path),
  )
  for name, sentence in dict(
    other='was trained beside other parameters',
    dora='is of DoRA',
    nothing='there is no adapter in',
  ).items():
    with pytest.raises(UserError, match=sentence):
      read(base, wrong, name)
  assert read(base, wrong, 'other', is_forced=True).name == 'other'
  moe = dataclasses.replace(MODELS['moe'], vocab_size=257)
  experts = draw_params(moe)
  wrong['experts'] = write_lora(base, experts, 'experts', targets='moe/gate$')
  with pytest.raises(UserError, match='matrices of experts'):
    read(base, wrong, 'experts', params=experts)


def test_what_does_not_fit_into_a_place(base, folders):
  params, places = with_places(base, dict(queries=folders['queries']))
  large = write_lora(base, drawn(), 'large', rank=4)
  for name, sentence in dict(
    everything='which none of those had', large='has room for 2'
  ).items():
    adapter = read(base, folders | dict(large=large), name)
    with pytest.raises(UserError, match=sentence):
      places.put(params, adapter)


def test_what_the_flag_says():
  assert parse(['a=x', 'b=y=z']) == dict(a='x', b='y=z')
  for entries, sentence in (
    (['a'], 'takes NAME=DIR'),
    (['=x'], 'takes NAME=DIR'),
    (['a=x', 'a=y'], "has 'a' twice"),
    ([f'{i}=x' for i in range(65)], 'must be at most 64, got 65'),
  ):
    with pytest.raises(UserError, match=sentence):
      parse(entries)
  with pytest.raises(UserError, match='is the name of the model'):
    served_adapters.check_names(dict(a='x'), 'a')
