# SPDX-License-Identifier: Apache-2.0
"""The engine with real programs: what is served is what is generated."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import random
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import Letters
from slot_models import MODELS, V, make_params
from told import Told

from jaxsparse.inference.decoding import generate_tokens
from jaxsparse.inference.engine import Engine
from jaxsparse.inference.grammar import Grammar
from jaxsparse.inference.jobs import Job, JobSampling, QueueFull
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.slot_programs import Programs

C, NUM_SLOTS, LENGTH = 4, 3, 32
NUM_PROMPTS = (1, C - 1, C, C + 1, 3 * C + 5)
# Programs of thirteen models, each of them compiled.
pytestmark = pytest.mark.slow


@functools.cache
def programs_of(name):
  config = MODELS[name]
  bounded = config.sparse and config.sparse.history_blocks
  params = jax.tree.map(jnp.asarray, make_params(config)['params'])
  return Programs.compile(
    config,
    params,
    NUM_SLOTS,
    LENGTH,
    (C, 2),
    bounded or None,
    stop_ids=(V - 1,),
  )


def jobs():
  """Each prompt twice, once of them with log-probabilities."""
  rng = np.random.default_rng(1)
  samplings = [
    JobSampling(temperature=0.0, ignore_eos=True),
    JobSampling(temperature=1.3, seed=7, ignore_eos=True),
    JobSampling(top_k=5, top_p=0.8, seed=2**32 - 1, ignore_eos=True),
  ]
  prompts = [rng.integers(0, V, n).tolist() for n in NUM_PROMPTS]
  return [
    Job(
      id=f'{i} {num_logprobs}',
      tokens=tuple(prompt),
      max_tokens=5 + i % 3,
      sampling=samplings[i % 3],
      num_logprobs=num_logprobs,
    )
    for i, prompt in enumerate(prompts)
    for num_logprobs in (None, 3)
  ]


@functools.cache
def generated(name):
  """Tokens of each job by itself, offline."""
  params = jax.tree.map(jnp.asarray, make_params(MODELS[name])['params'])
  found = {}
  for job in jobs():
    if job.num_logprobs is not None:
      continue
    how = job.sampling
    sampling = Sampling(
      temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
    )
    steps = generate_tokens(
      MODELS[name],
      params,
      [job.tokens],
      job.max_tokens,
      sampling,
      np.uint32(how.seed),
    )
    found[job.id] = tuple(int(step[0]) for step in steps)
    found[f'{job.id[0]} 3'] = found[job.id]
  return found


def serve(engine, order, cancelled=()):
  """What each job gets, among others that are cancelled meanwhile."""
  told = Told()
  for i in order:
    job = jobs()[i]
    engine.submit(job, told)
    if i in cancelled:
      other = Job(id=f'gone {i}', tokens=job.tokens, max_tokens=9)
      engine.submit(other, told)
      engine.cancel(other.id)
  return {
    job.id: (told.tokens(job.id), told.text(job.id), told.logprobs(job.id))
    for job in jobs()
  }


def started(name, **options):
  programs = programs_of(name)
  engine = Engine(lambda tell: programs, Letters(V - 1), **options)
  engine.start()
  while engine.state == 'starting':
    time.sleep(0.01)
  return engine


@contextlib.contextmanager
def no_compilation():
  names = []

  def listen(name, seconds, **kwargs):
    names.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.jit(lambda x: x + len(names))(1.0)
  # It listens.
  assert '/jax/core/compile/backend_compile_duration' in names
  names.clear()
  yield
  assert not [name for name in names if 'compile' in name]
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize('name', MODELS)
def test_the_order_of_arrival_changes_nothing(name):
  engine = started(name, max_queue=99, prefix_bytes=50_000)
  numbers, rng = range(len(jobs())), np.random.default_rng(0)
  expected = serve(engine, numbers)
  assert {i: tokens for i, (tokens, *_) in expected.items()} == generated(name)
  with no_compilation():
    for _ in range(20):
      cancelled = rng.permutation(numbers)[:3]
      # Bit for bit, log-probabilities as well.
      assert serve(engine, rng.permutation(numbers), cancelled) == expected
  # Also of those that begin with what others have read.
  assert engine.stats().prefix_cache_hits > 100
  assert engine.drain(10)


def test_nothing_compiles_whatever_is_asked_for():
  engine, told = started('convolved', prefix_bytes=50_000, max_queue=99), Told()
  options = dict(
    plain=dict(),
    penalties=dict(
      sampling=JobSampling(
        repetition_penalty=1.2, presence_penalty=1.0, frequency_penalty=0.5
      )
    ),
    limits=dict(sampling=JobSampling(top_k=3, top_p=0.5, min_p=0.1)),
    bias=dict(sampling=JobSampling(logit_bias=((3, 100.0),), min_tokens=2)),
    stop=dict(stop=('ab', 'c'), include_stop=True),
    ids=dict(stop_token_ids=(1, 2)),
    logprobs=dict(num_logprobs=20),
    echo=dict(wants_prompt_logprobs=True, num_logprobs=1),
    grammar=dict(grammar=Grammar('regex', '[ab]{2}c{2}')),
    scored=dict(wants_prompt_logprobs=True, max_tokens=0),
  )
  with no_compilation():
    for repeat in range(2):
      for name, fields in options.items():
        fields = dict(max_tokens=6) | fields
        job = Job(id=f'{name} {repeat}', tokens=tuple(range(13)), **fields)
        engine.submit(job, told)
        engine.submit(
          Job(id=f'gone {name} {repeat}', tokens=job.tokens, max_tokens=9), told
        )
        engine.cancel(f'gone {name} {repeat}')
      for name in options:
        told.wait(f'{name} {repeat}')
  assert told.tokens('bias 0') == (3,) * 6
  assert re.fullmatch('[ab]{2}cc', told.text('grammar 0'))
  assert len(told.events['scored 0'][-1].prompt_logprobs) == 13
  assert engine.drain(10)


def test_scores_of_a_prompt_are_those_of_its_tokens_when_drawn():
  engine, told = started('convolved'), Told()
  sampling = JobSampling(temperature=0.0, ignore_eos=True)
  greedy = dict(sampling=sampling, num_logprobs=2)
  engine.submit(Job(id='x', tokens=(1, 2, 3), max_tokens=9, **greedy), told)
  tokens = (1, 2, 3, *told.tokens('x'))
  scored = dict(wants_prompt_logprobs=True, num_logprobs=2, max_tokens=0)
  engine.submit(Job(id='y', tokens=tokens, **scored), told)
  prompt = told.wait('y')[-1].prompt_logprobs
  assert [x.token for x in prompt] == list(tokens)
  drawn = told.logprobs('x')
  for x, y in zip(prompt[3:], drawn, strict=True):
    np.testing.assert_allclose(x.logprob, y.logprob, atol=1e-5)
    # The likeliest token was drawn: the very same number.
    assert x.top[0] == (x.token, x.logprob)
    assert y.top[0] == (y.token, y.logprob)
  assert engine.drain(10)


def test_many_clients_who_come_and_go():
  engine = started('convolved', prefix_bytes=20_000)
  expected, failures = generated('convolved'), []
  ends = collections.Counter()

  def client(number):
    rng = random.Random(number)
    for turn in range(2000 // 64 + 1):
      job = rng.choice(jobs())
      name, told = f'{number}.{turn}', Told()
      canary = expected[job.id]
      job = dataclasses.replace(job, id=name)
      while True:
        try:
          engine.submit(job, told)
          break
        except QueueFull:
          ends['refused'] += 1
          time.sleep(0.01 * rng.random())
      if is_gone := rng.random() < 0.3:
        time.sleep(0.01 * rng.random())
        engine.cancel(name)
      tokens = told.tokens(name)
      ends[told.finish(name)] += 1
      whole = tokens == canary[: len(tokens)] if is_gone else tokens == canary
      if not whole:
        failures.append((name, tokens, canary))

  sizes = []
  for _ in range(2):
    threads = [
      threading.Thread(target=client, args=(number,)) for number in range(64)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    sizes.append(pathlib.Path('/proc/self/statm').read_text().split()[1])
  assert not failures
  assert ends['length'] + ends['abort'] == 2 * 64 * (2000 // 64 + 1)
  assert ends['refused'] > 100
  assert ends['abort'] > 100
  stats = engine.stats()
  assert (stats.running, stats.reading, stats.waiting) == (0, 0, 0)
  # Pages of memory.
  first, second = map(int, sizes)
  assert second < 1.02 * first
  assert engine.drain(10)


def test_a_program_that_fails_ends_every_job(caplog):
  engine, told = started('convolved'), Told()
  run = engine._programs._run
  plain = run['plain']

  def fail(*args):
    raise RuntimeError('out of memory')

  for name in 'abcd':
    job = Job(
      id=name,
      tokens=(1, 2),
      max_tokens=29,
      sampling=JobSampling(ignore_eos=True),
    )
    engine.submit(job, told)
  told.wait('a', has=len)
  run['plain'] = fail
  try:
    for name in 'abcd':
      assert told.wait(name)[-1].finish == 'error'
  finally:
    run['plain'] = plain
  assert engine.state == 'dead'
  assert 'out of memory' in caplog.text
