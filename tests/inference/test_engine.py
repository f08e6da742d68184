# SPDX-License-Identifier: Apache-2.0
"""Jobs in slots with a fake device: who gets what, and that all end once."""

import collections
import itertools
import random
import re
import threading
import time

import numpy as np
import pytest
from fake_programs import (
  BOUNDARY,
  CHUNK,
  LENGTH,
  FakePrograms,
  logprobs_of,
  next_token,
)
from told import Told

from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.inference import masks
from jaxsparse.inference.engine import Engine
from jaxsparse.inference.grammar import Grammar, Guides
from jaxsparse.inference.jobs import (
  Draining,
  EngineDead,
  Job,
  JobSampling,
  QueueFull,
  Starting,
)
from jaxsparse.inference.text import stream_text

TOKENIZER = ByteTokenizer()


def alone(job):
  """Tokens and text of a job, from the model and stream_text alone."""
  tokens, drawn, text = list(job.tokens), [], ''
  while len(drawn) < job.max_tokens:
    token = next_token(tokens, job.sampling.seed)
    drawn.append(token)
    tokens.append(token)
    if token == BOUNDARY and not job.sampling.ignore_eos:
      break
    letters = [x for x in drawn if x != BOUNDARY]
    whole = ''.join(stream_text(letters, TOKENIZER, job.tokens))
    text = ''.join(stream_text(letters, TOKENIZER, job.tokens, job.stop))
    if text != whole:
      break
  return tuple(drawn), text


@pytest.fixture
def engine_of():
  engines = []

  def start(programs=None, **options):
    engine = Engine(
      lambda tell: programs or FakePrograms(), TOKENIZER, **options
    )
    engine.start()
    engines.append(engine)
    wait_until(lambda: engine.state != 'starting')
    return engine

  yield start
  for engine in engines:
    engine.drain(5)


def wait_until(condition):
  for _ in range(2000):
    if condition():
      return
    time.sleep(0.005)
  raise AssertionError('it never came so')


def job(name, num_prompt=5, max_tokens=9, **options):
  rng = random.Random(f'{name}')
  tokens = tuple(rng.randrange(97, 123) for _ in range(num_prompt))
  return Job(id=str(name), tokens=tokens, max_tokens=max_tokens, **options)


LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


@pytest.mark.parametrize('num_slots', [1, 3, 16])
def test_each_job_gets_what_it_would_get_alone(engine_of, num_slots):
  engine, told = engine_of(FakePrograms(num_slots), max_queue=99), Told()
  rng = random.Random(num_slots)
  jobs = [
    job(
      number,
      rng.choice(LENGTHS),
      rng.choice([1, 2, 30]),
      sampling=JobSampling(seed=rng.choice([0, 5])),
      stop=rng.choice([(), ('a',), ('bc', 'q')]),
    )
    for number in range(60)
  ]
  for x in jobs:
    engine.submit(x, told)
  for x in jobs:
    tokens, text = alone(x)
    assert (told.tokens(x.id), told.text(x.id)) == (tokens, text), x
    offsets = [o for e in told.events[x.id] for o in e.offsets]
    assert offsets == list(range(len(tokens)))
  wait_until(lambda: not engine.stats().running)
  stats = engine.stats()
  assert (stats.waiting, stats.queue_tokens, stats.reading) == (0, 0, 0)
  assert sum(stats.finished.values()) == 60
  assert stats.generation_tokens == sum(len(told.tokens(x.id)) for x in jobs)
  wait_until(lambda: engine.heartbeat_age() == 0)


def test_why_a_text_ends_is_told(engine_of):
  engine, told = engine_of(), Told()
  base = job('x', max_tokens=60, sampling=JobSampling(ignore_eos=True))
  drawn, text = alone(base)
  at = drawn.index(BOUNDARY)
  assert 3 < at < 50, 'another prompt is needed'

  def run(name, **options):
    fields = dict(id=name, tokens=base.tokens, max_tokens=60)
    engine.submit(Job(**fields | options), told)
    last = told.wait(name)[-1]
    return (
      len(told.tokens(name)),
      told.text(name),
      last.finish,
      last.stop_reason,
    )

  assert run('all', sampling=base.sampling) == (60, text, 'length', None)
  assert run('end') == (at + 1, text[:at], 'stop', None)
  assert run('length', max_tokens=2) == (2, text[:2], 'length', None)
  stop = text[1:3]
  begin = text.index(stop)
  assert run('stop', stop=(stop,)) == (begin + 2, text[:begin], 'stop', stop)
  kept = run('kept', stop=(stop,), include_stop=True)
  assert kept == (begin + 2, text[: begin + 2], 'stop', stop)
  token = drawn[2]
  first = drawn.index(token)
  ids = dict(stop_token_ids=(token,))
  assert run('id', **ids) == (first + 1, text[:first], 'stop', token)
  kept = run('kept id', include_stop=True, **ids)
  assert kept == (first + 1, text[: first + 1], 'stop', token)
  late = run('late', sampling=JobSampling(min_tokens=first + 1), **ids)
  assert late[0] > first + 1


def test_scores_of_drawn_tokens_and_of_the_prompt(engine_of):
  engine, told = engine_of(), Told()
  x = job(
    'x',
    2 * CHUNK + 3,
    4,
    num_logprobs=2,
    wants_prompt_logprobs=True,
    sampling=JobSampling(ignore_eos=True),
  )
  engine.submit(x, told)
  # Neither its neighbour, which wants none, nor its chunks change anything.
  engine.submit(job('y', 3, 40), told)
  whole = x.tokens + told.tokens('x')
  first, *others = told.events['x']
  scored = list(first.prompt_logprobs)
  assert all(e.prompt_logprobs is None for e in others)
  scored += [s for e in told.events['x'] for s in e.logprobs]
  assert [s.token for s in scored] == list(whole)
  assert (scored[0].logprob, scored[0].top) == (None, ())
  for place, score in enumerate(scored[1:], 1):
    expected = logprobs_of(whole[:place])
    assert score.logprob == float(expected[whole[place]])
    best = (-expected).argsort()[:2].tolist()
    assert score.top == tuple((i, float(expected[i])) for i in best)
  assert all(e.logprobs is None for e in told.wait('y'))


def test_no_token_is_asked_for(engine_of):
  engine, told = engine_of(), Told()
  engine.submit(job('x', 20, 0, wants_prompt_logprobs=True), told)
  (event,) = told.wait('x')
  assert (event.finish, event.tokens) == ('length', ())
  assert len(event.prompt_logprobs) == 20
  engine.submit(job('y', 20, 0), told)
  assert told.wait('y')[-1].finish == 'length'


def test_what_has_been_read_is_not_read_again(engine_of):
  programs = FakePrograms()
  engine, told = engine_of(programs, prefix_bytes=10_000, max_queue=20), Told()
  tokens = job('x', 4 * CHUNK + 2).tokens
  sampling = [JobSampling(seed=number) for number in range(5)]
  jobs = [
    Job(id=f'{s.seed}', tokens=tokens, max_tokens=9, sampling=s)
    for s in sampling
  ]
  engine.submit_all(jobs, told)
  for x in jobs:
    assert told.tokens(x.id) == alone(x)[0]
    assert told.events[x.id][0].num_cached == (x.id != '0') * 4 * CHUNK
  names = collections.Counter(name for name, _ in programs.calls)
  # The prompt once, and the end of it for each of the others.
  assert (names['prefill'], names['insert'], names['snapshot']) == (9, 4, 1)
  stats = engine.stats()
  assert stats.prefix_cache_queries == 5 * len(tokens)
  assert stats.prefix_cache_hits == 4 * 4 * CHUNK
  assert stats.prefix_bytes == 10 * 4 * CHUNK
  engine.submit(Job(id='salt', tokens=tokens, max_tokens=1, salt='a'), told)
  assert told.wait('salt')[0].num_cached == 0


def test_a_long_prompt_does_not_hold_up_those_who_draw(engine_of):
  programs = FakePrograms()
  engine, told = engine_of(programs), Told()
  engine.submit(job('x', 2, 90, sampling=JobSampling(ignore_eos=True)), told)
  told.wait('x', has=lambda events: len(events) > 1)
  engine.submit(job('y', 9 * CHUNK, 2), told)
  told.wait('x')
  told.wait('y')
  names = [name for name, _ in programs.calls]
  read = [i for i, name in enumerate(names) if name == 'prefill'][1:]
  assert len(read) == 9
  # A decode step between each two chunks.
  assert all(j - i == 2 for i, j in itertools.pairwise(read))


def test_the_device_is_given_a_step_before_the_last_one_is_read(engine_of):
  log, programs = [], FakePrograms()
  engine, told = engine_of(programs), Told()
  real = programs._pending

  def pending(slot, drawn):
    x, number = real(slot, drawn), len(log)
    log.append('given')
    result = x.result
    x.result = lambda: (log.append(f'read {number}'), result())[1]
    return x

  programs._pending = pending
  engine.submit(job('x', 2, 5, sampling=JobSampling(ignore_eos=True)), told)
  told.wait('x')
  # No step is given for a length that is known to be the last.
  assert log.count('given') == 5
  for number, entry in enumerate(log):
    if entry.startswith('read'):
      given = log[:number].count('given')
      assert given == 5 or given > int(entry.split()[1]) + 1
  assert engine.stats().wasted_tokens == 0


def test_a_late_token_is_not_the_next_tenants(engine_of):
  programs = FakePrograms(1)
  engine, told = engine_of(programs, max_queue=50), Told()
  stopped = [job(i, 3, 50, stop=('a', 'e', 'i', 'o', 'u')) for i in range(40)]
  for x in stopped:
    engine.submit(x, told)
  for x in stopped:
    assert told.tokens(x.id) == alone(x)[0]
  wait_until(lambda: engine.stats().wasted_tokens > 10)


def test_cancel_at_any_time_ends_one_job_and_no_other(engine_of):
  programs = FakePrograms(2, 0.05)
  engine, told = engine_of(programs), Told()
  forever = dict(sampling=JobSampling(ignore_eos=True))
  names = ['a', 'b', 'waiting', 'c']
  for name in names:
    engine.submit(job(name, 3, 60, **forever), told)
  for name in ('waiting', 'b', 'b', 'nobody'):
    engine.cancel(name)
  for name in ('waiting', 'b'):
    assert told.wait(name)[-1].finish == 'abort'
  programs.seconds = 0
  for name in ('a', 'c'):
    assert told.tokens(name) == alone(job(name, 3, 60, **forever))[0]
    engine.cancel(name)
  programs.seconds = 0.05
  engine.submit(job('reading', 80, 5), told)
  wait_until(lambda: engine.stats().reading)
  engine.cancel('reading')
  assert told.wait('reading')[-1].finish == 'abort'
  assert sum(engine.stats().cancelled.values()) == 3
  # An id may come again after its end.
  engine.submit(job('b', 3, 4), told := Told())
  assert told.tokens('b') == alone(job('b', 3, 4))[0]


def test_cancelled_within_a_step(engine_of):
  programs = FakePrograms(1)
  engine, steps = engine_of(programs), []

  def deliver(events):
    steps.append(len(programs.calls))
    if len(steps) == 3:
      engine.cancel('x')
    if events[-1].finish:
      ended.set()

  ended = threading.Event()
  engine.submit(job('x', 3, 90, sampling=JobSampling(ignore_eos=True)), deliver)
  assert ended.wait(10)
  assert len(programs.calls) <= steps[2] + 1


def test_queues_are_bounded_by_jobs_and_by_tokens(engine_of):
  programs = FakePrograms(1, 0.05)
  engine, told = engine_of(programs, max_queue_tokens=50), Told()
  slow = dict(sampling=JobSampling(ignore_eos=True))
  engine.submit(job('runs', 3, 90, **slow), told)
  wait_until(lambda: engine.stats().running)
  for number in range(4):
    engine.submit(job(number, 5, 1), told)
  with pytest.raises(QueueFull, match='4 texts after 20 tokens') as info:
    engine.submit(job('more', 1, 1), told)
  assert 1 <= info.value.retry_after <= 120
  engine.cancel('0')
  told.wait('0')
  with pytest.raises(QueueFull, match='3 texts after 15 tokens'):
    engine.submit(job('long', 36, 1), told)
  with pytest.raises(ValueError, match='there is a job runs already'):
    engine.submit(job('runs', 1, 1), told)
  engine.submit(job('fits', 35, 1), told)
  with pytest.raises(UserError, match='5 texts at once must be at most 4'):
    engine.submit_all([job(f'n{i}', 1, 1) for i in range(5)], told)
  assert engine.stats().rejected == dict(requests=1, tokens=1)
  time.sleep(0.05)
  engine.cancel('runs')
  programs.seconds = 0
  for name in ('1', '2', '3', 'fits'):
    assert told.wait(name)[0].queue_seconds > 0.05


def test_either_all_choices_are_taken_or_none(engine_of):
  programs = FakePrograms(1, 0.05)
  engine, told = engine_of(programs), Told()
  forever = dict(sampling=JobSampling(ignore_eos=True))
  engine.submit(job('runs', 3, 90, **forever), told)
  wait_until(lambda: not engine.stats().waiting)
  engine.submit_all([job(i, 3, 1) for i in range(3)], told)
  with pytest.raises(QueueFull):
    engine.submit_all([job(f'n{i}', 3, 1) for i in range(2)], told)
  assert engine.stats().waiting == 3
  programs.seconds = 0


@pytest.mark.parametrize(
  ('num_prompt', 'max_tokens'), [(LENGTH, 1), (1, LENGTH), (0, 1)]
)
def test_what_can_never_run_is_refused(engine_of, num_prompt, max_tokens):
  with pytest.raises(UserError, match='tokens'):
    engine_of().submit(job('x', num_prompt, max_tokens), Told())


def test_a_model_of_text_is_shown_no_picture(engine_of):
  seeing = job('x', 1, 1, picture=np.zeros((4, 4, 3), np.uint8))
  with pytest.raises(UserError, match='sees no pictures'):
    engine_of().submit(seeing, Told())


def test_a_slot_can_be_filled_to_its_end(engine_of):
  engine, told = engine_of(), Told()
  x = job('x', 1, LENGTH - 1, sampling=JobSampling(ignore_eos=True))
  engine.submit(x, told)
  assert len(told.tokens('x')) == LENGTH - 1


@pytest.mark.parametrize('call', [1, 2, 3, 9])
def test_a_fault_ends_all_jobs_and_the_engine(engine_of, call, caplog):
  programs = FakePrograms(2, fails_at=call)
  engine, told = engine_of(programs), Told()
  names = [f'{i}' for i in range(6)]
  accepted = []
  for name in names:
    try:
      engine.submit(job(name, 20, 70), told)
      accepted.append(name)
    except EngineDead:
      assert engine.state == 'dead'
  for name in accepted:
    assert told.wait(name)[-1].finish == 'error'
    assert 'the device is gone' in told.events[name][-1].error
  assert isinstance(engine.failure, RuntimeError)
  assert 'the engine has failed' in caplog.text
  with pytest.raises(EngineDead):
    engine.submit(job('late'), told)
  stats = engine.stats()
  assert (stats.running, stats.waiting, stats.reading) == (0, 0, 0)
  assert not engine.drain(1)


def test_programs_that_can_not_be_built():
  def build(tell):
    tell('compiling 1 of 9')
    raise RuntimeError('no room')

  engine = Engine(build, TOKENIZER)
  with pytest.raises(Starting, match='is starting: a moment'):
    engine.submit(job('x'), Told())
  engine.start()
  wait_until(lambda: engine.state == 'dead')
  assert (str(engine.failure), engine.stage) == ('no room', 'compiling 1 of 9')


@pytest.mark.parametrize(
  ('error', 'is_logged'), [(UserError('no.'), False), (OSError('no.'), True)]
)
def test_what_a_user_can_mend_is_no_traceback(caplog, error, is_logged):
  def build(tell):
    raise error

  engine = Engine(build, TOKENIZER)
  engine.start()
  wait_until(lambda: engine.state == 'dead')
  assert engine.failure is error
  assert ('the engine has failed' in caplog.text) == is_logged


def test_a_device_that_hangs_shows_in_the_heartbeat(engine_of):
  programs = FakePrograms(2, 1.0)
  engine, told = engine_of(programs), Told()
  wait_until(lambda: engine.heartbeat_age() == 0)
  engine.submit(job('x', 3, 2), told)
  wait_until(lambda: engine.heartbeat_age() > 0.3)
  # It does not keep who ends the process.
  start = time.monotonic()
  assert not engine.drain(0.1)
  assert time.monotonic() - start < 3
  programs.seconds = 0


def test_draining_finishes_what_runs_and_nothing_else(engine_of):
  engine, told = engine_of(FakePrograms(2, 0.02)), Told()
  slow = dict(sampling=JobSampling(ignore_eos=True))
  for name in ('a', 'b', 'waits'):
    engine.submit(job(name, 3, 40, **slow), told)
  told.wait('b', has=len)
  assert engine.drain(20)
  for name in ('a', 'b'):
    assert told.finish(name) == 'length'
    assert told.tokens(name) == alone(job(name, 3, 40, **slow))[0]
  last = told.events['waits'][-1]
  assert (last.finish, last.error) == ('abort', 'draining')
  assert engine.state == 'dead'
  with pytest.raises(EngineDead):
    engine.submit(job('late'), told)


def test_draining_ends_with_its_time(engine_of):
  engine, told = engine_of(FakePrograms(2, 0.02)), Told()
  slow = dict(sampling=JobSampling(ignore_eos=True))
  engine.submit(job('x', 3, 90, **slow), told)
  told.wait('x', has=len)
  results = []
  thread = threading.Thread(target=lambda: results.append(engine.drain(0.2)))
  thread.start()
  wait_until(lambda: engine.state == 'draining')
  with pytest.raises(Draining):
    engine.submit(job('late'), told)
  thread.join()
  assert results == [False]
  assert told.events['x'][-1].error == 'draining'


def test_a_listener_that_is_gone_does_not_end_the_others(engine_of, caplog):
  engine, told = engine_of(), Told()

  def gone(events):
    raise RuntimeError('Event loop is closed')

  engine.submit(job('gone', 3, 90), gone)
  engine.submit(job('x', 3, 50), told)
  assert told.tokens('x') == alone(job('x', 3, 50))[0]
  wait_until(lambda: not engine.stats().running)
  assert engine.stats().finished['abort'] == 1
  assert 'could not be delivered' in caplog.text


def test_events_of_a_step_come_at_once(engine_of):
  engine, told = engine_of(FakePrograms(3)), Told()
  jobs = [
    job(i, 3, 40, sampling=JobSampling(ignore_eos=True)) for i in range(3)
  ]
  engine.submit_all(jobs, told)
  for x in jobs:
    told.wait(x.id)
  assert max(map(len, told.batches)) == 3
  assert len(told.batches) < 50


def test_what_is_measured(engine_of):
  measures = []
  engine = engine_of(observe=lambda *measure: measures.append(measure))
  told = Told()
  engine.submit(job('x', 20, 5, sampling=JobSampling(ignore_eos=True)), told)
  told.wait('x')
  labels = collections.Counter((name, label) for name, _, label in measures)
  assert labels['step_seconds', 'prefill'] == 3
  assert labels['step_seconds', 'plain'] == 4
  assert labels['batch_occupancy', ''] == 4
  assert labels['request_queue_time_seconds', ''] == 1
  assert all(value >= 0 for _, value, _ in measures)
  assert engine.stats().steps == dict(prefill=3, plain=4)


def test_texts_with_grammars_among_others(engine_of):
  programs = FakePrograms(3)
  engine, told = engine_of(programs, max_queue=20), Told()
  plain = job('plain', 3, 90, sampling=JobSampling(ignore_eos=True))
  engine.submit(plain, told)
  for seed in range(6):
    x = job(
      f'{seed}', 20, 20, grammar=Grammar('regex', '[ab]{3}(cd)?[0-9]{2}'),
      sampling=JobSampling(seed=seed), wants_prompt_logprobs=seed == 5,
    )  # fmt: skip
    engine.submit(x, told)
  for seed in range(6):
    assert re.fullmatch('[ab]{3}(cd)?[0-9]{2}', told.text(f'{seed}'))
    assert told.finish(f'{seed}') == 'stop'
    assert ''.join(map(chr, told.tokens(f'{seed}'))) == told.text(f'{seed}')
  assert told.tokens('plain') == alone(plain)[0]
  # Others have not waited for it: as many steps as tokens, or none for chunks.
  decoded = [what for name, what in programs.calls if name == 'decode']
  slot = decoded[0][0]
  first = next(i for i, slots in enumerate(decoded) if slot in slots)
  # Later the slot may have another tenant.
  assert sum(slot in slots for slots in decoded[first : first + 89]) == 89


def test_a_grammar_ends_with_the_length_and_a_stop_string(engine_of):
  engine, told = engine_of(), Told()
  grammar = Grammar('regex', 'abcabc[0-9]*')
  engine.submit(job('x', max_tokens=4, grammar=grammar), told)
  engine.submit(job('y', grammar=grammar, stop=('cab',)), told)
  # The last letters may begin it.
  engine.submit(job('z', grammar=Grammar('regex', 'abc'), stop=('cx',)), told)
  ends = [(told.text(x), told.finish(x)) for x in 'xyz']
  assert ends == [('abca', 'length'), ('ab', 'stop'), ('abc', 'stop')]


def test_a_grammar_that_is_none_or_takes_too_long(engine_of, monkeypatch):
  monkeypatch.setattr(masks, 'MOST_SECONDS', 0.3)
  engine, told = engine_of(), Told()
  is_free = threading.Event()
  engine.submit(job('none', grammar=Grammar('regex', 'a{')), told)
  assert told.wait('none')[-1].finish == 'error'
  assert 'unclosed' in told.events['none'][-1].error
  monkeypatch.setattr(Guides, 'start', lambda *args: is_free.wait(20))
  engine.submit(job('slow', grammar=Grammar('regex', 'a')), told)
  engine.submit(job('gone', grammar=Grammar('regex', 'a')), told)
  engine.cancel('gone')
  assert told.wait('gone')[-1].finish == 'abort'
  last = told.wait('slow')[-1]
  assert (last.finish, last.error[:22]) == ('error', 'the grammar takes more')
  # What comes too late is nobody's.
  is_free.set()
  engine.submit(job('x', 3, 4), told)
  assert told.tokens('x') == alone(job('x', 3, 4))[0]
  assert engine.state == 'ready'


def test_many_clients_with_cancels_and_refusals(engine_of):
  programs = FakePrograms(8)
  # Of 24 clients 8 have a slot and so few may wait that some are refused.
  engine = engine_of(programs, max_queue=8, prefix_bytes=2000)
  ends = collections.Counter()
  failures = []

  def client(number):
    rng = random.Random(number)
    for turn in range(40):
      told = Told()
      name = f'{number}.{turn}'
      x = job(
        name,
        rng.choice(LENGTHS),
        rng.randint(1, 20),
        sampling=JobSampling(seed=rng.randrange(9)),
      )
      while True:
        try:
          engine.submit(x, told)
          break
        except QueueFull:
          ends['refused'] += 1
          time.sleep(0.001 * rng.random())
      if rng.random() < 0.3:
        time.sleep(0.002 * rng.random())
        engine.cancel(name)
      tokens, expected = told.tokens(name), alone(x)[0]
      finish = told.finish(name)
      ends[finish] += 1
      if tokens != expected[: len(tokens)] or (
        finish != 'abort' and tokens != expected
      ):
        failures.append((name, tokens, expected))

  threads = [
    threading.Thread(target=client, args=(number,)) for number in range(24)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert not failures
  assert ends['abort'] > 20
  assert ends['refused'] > 20
  assert sum(ends.values()) - ends['refused'] == 24 * 40
  wait_until(lambda: not (engine.stats().running or engine.stats().reading))
  stats = engine.stats()
  assert (stats.waiting, stats.queue_tokens) == (0, 0)
  assert sum(stats.finished.values()) == 24 * 40
