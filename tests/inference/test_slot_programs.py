# SPDX-License-Identifier: Apache-2.0
"""Slots as an engine drives them: what a request gets hangs on it alone."""

import dataclasses
import functools
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from letters import Letters
from parameters import place
from slot_models import MODELS, V, make_params, tolerance
from told import Told

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.inference import batch_rows
from jaxsparse.inference.engine import Engine
from jaxsparse.inference.jobs import Job, JobSampling
from jaxsparse.inference.sampling import Sampling, sample
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.nn.transformer import Transformer, init_cache

C, NUM_SLOTS, MAX_TOKENS = 4, 3, 4
PROMPTS = (1, C - 1, C, C + 1, 3 * C + 5)
LENGTH = max(PROMPTS) + MAX_TOKENS
SAMPLINGS = (
  JobSampling(temperature=0.0),
  JobSampling(temperature=1.3, seed=7),
  JobSampling(top_k=5, top_p=0.8, seed=2**32 - 1),
  JobSampling(temperature=0.0),
  JobSampling(temperature=0.7, seed=8),
)
kinds = pytest.mark.parametrize('name', few(['small'], MODELS))


def prompts():
  rng = np.random.default_rng(5)
  return [rng.integers(0, V, n).tolist() for n in PROMPTS]


@functools.cache
def programs(name):
  config = MODELS[name]
  blocks = config.sparse.history_blocks if config.sparse else 0
  return Programs.compile(
    config,
    jax.tree.map(jnp.asarray, make_params(config)['params']),
    NUM_SLOTS,
    LENGTH,
    # Of several lengths where time does not matter.
    chunks=(C,) if name == 'small' else (C, 2),
    history_blocks=blocks or None,
    stop_ids=(0,),
  )


def served(run, order, seed, form=None):
  """Tokens and their log-probabilities of each job, from slots at random."""
  rng = np.random.default_rng(seed)
  texts, waiting = prompts(), list(order)
  job_of = [None] * NUM_SLOTS
  tokens = {job: [] for job in order}
  logprobs = {job: [] for job in order}
  read = {}
  while waiting or any(job is not None for job in job_of):
    free = [slot for slot, job in enumerate(job_of) if job is None]
    if free and waiting and rng.random() < 0.7:
      slot, job = rng.choice(free), waiting.pop(0)
      run.start(slot, SAMPLINGS[job])
      job_of[slot], read[job] = job, 0
    reading = [
      s for s, job in enumerate(job_of)
      if job is not None and read[job] < len(texts[job])
    ]  # fmt: skip
    if reading and rng.random() < 0.7:
      slot = rng.choice(reading)
      job = job_of[slot]
      part = texts[job][read[job] :][: run.chunks[0]]
      read[job] += len(part)
      is_last = read[job] == len(texts[job])
      drawn = run.prefill(slot, part, is_last, 'logprobs').result()
      if is_last:
        tokens[job].append(int(drawn.tokens[slot]))
        logprobs[job].append(float(drawn.logprob[slot]))
    live = [
      s for s, job in enumerate(job_of)
      if job is not None and read[job] == len(texts[job])
    ]  # fmt: skip
    if live:
      is_live = np.isin(np.arange(NUM_SLOTS), live)
      forms = [SAMPLINGS[job_of[s]].form for s in live]
      needed = 'sorted' if 'sorted' in forms else 'plain'
      drawn = run.decode(is_live, form or needed).result()
      for slot in live:
        job = job_of[slot]
        if len(tokens[job]) == MAX_TOKENS:
          job_of[slot] = None
          continue
        tokens[job].append(int(drawn.tokens[slot]))
        if drawn.logprob is not None:
          logprobs[job].append(float(drawn.logprob[slot]))
  return tokens, logprobs


@functools.cache
def scores_of(name, length=LENGTH):
  """(tokens [1, length]) -> log-probabilities of all places [length, V]."""
  config = MODELS[name]
  params = jax.tree.map(jnp.asarray, make_params(config))

  @jax.jit
  def scores(tokens):
    at = jnp.arange(length, dtype=jnp.int32)[None]
    cache = init_cache(config, 1, length)
    ones = jnp.ones_like(at)
    logits = Transformer(config).apply(params, tokens, at, ones, cache)[0]
    return jax.nn.log_softmax(logits[0])

  return scores


def padded(text, length=LENGTH):
  return np.array([[*text, *[0] * (length - len(text))]], np.int32)


@functools.cache
def alone(name):
  """Tokens of each job as they are drawn offline, token after token."""
  found = {}
  for job, (prompt, how) in enumerate(zip(prompts(), SAMPLINGS, strict=True)):
    text = list(prompt)
    sampling = Sampling(
      temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
    )
    for step in range(MAX_TOKENS):
      last = scores_of(name)(padded(text))[len(text) - 1]
      key = jax.random.fold_in(jax.random.key(np.uint32(how.seed)), step)
      text.append(int(sample(last[None], key, sampling)[0]))
    found[job] = text[len(prompt) :]
  return found


@kinds
def test_a_request_gets_what_it_gets_alone(name):
  run, jobs = programs(name), range(len(PROMPTS))
  assert served(run, jobs, 0)[0] == alone(name)
  expected = served(run, jobs, 1, 'logprobs')
  assert expected[0] == alone(name)
  rng = np.random.default_rng(0)
  for seed in range(2, 6):
    # Bit for bit.
    assert served(run, rng.permutation(jobs), seed, 'logprobs') == expected


def test_slots_that_nobody_has_change_nothing(monkeypatch):
  """As a GPU has one beside a single slot."""
  monkeypatch.setitem(batch_rows._LEAST, 'cpu', NUM_SLOTS)
  whole = programs('small')
  run = Programs.compile(
    whole.config, whole._params, 1, LENGTH, chunks=(C,), stop_ids=(0,)
  )
  assert run._run is whole._run
  monkeypatch.setitem(globals(), 'NUM_SLOTS', 1)
  assert served(run, range(len(PROMPTS)), 0)[0] == alone('small')
  mask = np.zeros((1, -(-V // 32)), np.uint32)
  mask[0, 0] = 1 << 9
  drawn = run.decode(np.ones(1, bool), mask=mask).result()
  np.testing.assert_array_equal(drawn.tokens, [9])
  assert len(run.lengths()) == 1


def read(run, slot, tokens, **kwargs):
  """Reads a prompt; what was drawn, and snapshots of each full chunk."""
  snapshots, size = {}, run.chunks[0]
  for begin in range(run.lengths()[slot], len(tokens), size):
    part = tokens[begin : begin + size]
    is_last = begin + size >= len(tokens)
    pending = run.prefill(slot, part, is_last, 'logprobs', **kwargs)
    if len(part) == size:
      snapshots[begin + size] = run.snapshot(slot)
  return pending.result(), snapshots


def continued(run, slot, drawn, num_tokens=MAX_TOKENS):
  """Tokens and log-probabilities from the first one of a slot on."""
  is_live = np.arange(NUM_SLOTS) == slot
  found = [(int(drawn.tokens[slot]), float(drawn.logprob[slot]))]
  for _ in range(num_tokens - 1):
    drawn = run.decode(is_live, 'logprobs').result()
    found.append((int(drawn.tokens[slot]), float(drawn.logprob[slot])))
  return found


@kinds
def test_a_snapshot_goes_on_as_if_it_had_been_read(name):
  """Bit for bit, in any slot, more than once, what the prompt had included."""
  run, prompt = programs(name), prompts()[-1]
  sampling = JobSampling(temperature=0.0, repetition_penalty=3.0)
  run.start(0, sampling)
  drawn, snapshots = read(run, 0, prompt)
  expected = continued(run, 0, drawn)
  assert sorted(snapshots) == [C, 2 * C, 3 * C, 4 * C]
  for slot, length in ((2, 2 * C), (0, 4 * C), (1, C), (1, 2 * C)):
    # Others are being read in it before.
    run.start(slot, JobSampling())
    run.prefill(slot, prompts()[2], False)
    run.start(slot, sampling)
    run.insert(slot, snapshots[length])
    assert run.lengths()[slot] == length
    drawn, more = read(run, slot, prompt)
    assert continued(run, slot, drawn) == expected
    for i, snapshot in more.items():
      # What was inserted is not held twice.
      shared = set(snapshots[length].chunks) & set(snapshot.chunks)
      assert len(shared) == len(snapshots[length].chunks) or run.endless
      assert snapshot.num_bytes == snapshots[i].num_bytes
  # A slot keeps nothing alive that nobody else has: what it has is its own.
  parts = [weakref.ref(part) for part in snapshots[C].chunks]
  del snapshots, more, snapshot, shared
  assert not any(part() for part in parts)
  run.decode(np.arange(NUM_SLOTS) == 0)
  with pytest.raises(ValueError, match='not at a chunk'):
    run.snapshot(0)


@kinds
def test_a_tenant_sees_nothing_of_the_one_before(name):
  run, jobs = programs(name), range(len(PROMPTS))
  expected = served(run, jobs, 1, 'logprobs')
  run._state['cache'] = jax.tree.map(
    lambda x: jnp.full_like(x, 1e4 if x.dtype == jnp.float32 else 1),
    run._state['cache'],
  )
  assert served(run, jobs, 1, 'logprobs') == expected


@kinds
def test_prompts_are_scored(name):
  run, prompt = programs(name), prompts()[-1]
  run.start(1, JobSampling(temperature=0.0))
  found, tops = [], []
  for begin in range(0, len(prompt), C):
    part = prompt[begin : begin + C]
    targets = [*prompt[begin + 1 : begin + C + 1], 0][: len(part)]
    is_last = begin + C >= len(prompt)
    drawn = run.score(1, part, targets, is_last, 'logprobs').result()
    assert drawn.prompt_logprob.shape == (len(part),)
    found += drawn.prompt_logprob.tolist()
    tops += drawn.prompt_top_ids.tolist()
  scores = np.asarray(scores_of(name)(padded(prompt)))[: len(prompt)]
  expected = scores[np.arange(len(prompt) - 1), prompt[1:]]
  atol = tolerance(run.config, 1e-5)
  np.testing.assert_allclose(found[:-1], expected, atol=atol)
  assert [top[0] for top in tops] == scores.argmax(1).tolist()
  assert drawn.tokens[1] == scores[-1].argmax()
  np.testing.assert_allclose(drawn.logprob[1], scores[-1].max(), atol=atol)


@kinds
def test_nothing_compiles_once_it_runs(name, caplog):
  run = programs(name)
  assert run.num_compiled <= 16
  with jax.log_compiles():
    run.start(0, JobSampling())
    read(run, 0, prompts()[-1])
    run.start(0, JobSampling(seed=3, logit_bias=((1, 2.0),), min_tokens=2))
    _, snapshots = read(run, 0, prompts()[-1])
    run.start(1, JobSampling(top_k=3))
    run.insert(1, snapshots[C])
    run.score(1, [1, 2], [2, 3], True, 'logprobs').result()
    is_live = np.array([True, True, False])
    mask = np.full((NUM_SLOTS, 1), 7, np.uint32)
    for form in ('plain', 'sorted', 'logprobs'):
      run.decode(is_live, form).result()
      drawn = run.decode(is_live, form, mask).result()
      assert drawn.tokens[:2].max() < 3
  assert not [r for r in caplog.records if 'ompil' in r.getMessage()]
  with pytest.raises(TypeError):
    run.decode(np.array([True, False]))


def on_mesh(name, *sizes):
  config, one = MODELS[name], np.ones((2, 2), np.int32)
  devices = jax.devices()[: np.prod(sizes)]
  with jax.set_mesh(mesh.make_mesh(*sizes, devices=devices)):
    init = Transformer(config).init
    params = place(make_params(config), init, one, one, one)['params']
  blocks = config.sparse.history_blocks if config.sparse else 0
  return Programs.compile(
    config,
    params,
    NUM_SLOTS,
    LENGTH,
    chunks=(C,),
    history_blocks=blocks or None,
    stop_ids=(0,),
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_devices_hold_parts_of_all_slots(name):
  run, jobs = on_mesh(name, 1, 1, 2), range(len(PROMPTS))
  expected = served(run, jobs, 1, 'logprobs')
  assert expected[0] == alone(name)
  assert served(run, jobs[::-1], 2, 'logprobs') == expected
  run.start(0, JobSampling())
  _, snapshots = read(run, 0, prompts()[-1])
  run.start(1, JobSampling(temperature=0.0))
  run.insert(1, snapshots[C])
  drawn, _ = read(run, 1, prompts()[-1])
  run.start(2, JobSampling(temperature=0.0))
  other, _ = read(run, 2, prompts()[-1])
  assert continued(run, 1, drawn) == continued(run, 2, other)


def test_a_mesh_that_splits_sequences_is_refused():
  with pytest.raises(UserError, match=r'shape \(1, 1, n\)'):
    on_mesh('small', 2, 1, 1)


def test_what_does_not_fit_is_no_chunk():
  run = programs('small')
  run.start(0, JobSampling())
  for tokens in ([], [1] * (C + 1)):
    with pytest.raises(ValueError, match='fit no chunk'):
      run.prefill(0, tokens, True)


@pytest.mark.slow
def test_a_bounded_history_reads_without_an_end():
  run, length = programs('bounded'), 5 * LENGTH
  prompt = np.random.default_rng(6).integers(0, V, length).tolist()
  assert run.length > length
  run.start(1, JobSampling(temperature=0.0))
  run.start(2, JobSampling(temperature=0.0))
  first = int(run.prefill(2, prompt[:2], True).result().tokens[2])
  other = []
  for begin in range(0, length, C):
    is_last = begin + C >= length
    drawn = run.prefill(1, prompt[begin : begin + C], is_last, 'logprobs')
    # Another one goes on meanwhile.
    is_live = np.array([False, False, True])
    other.append(int(run.decode(is_live).result().tokens[2]))
  drawn = drawn.result()
  scores_of_text = scores_of('bounded', length)
  scores = np.asarray(scores_of_text(padded(prompt, length)))
  assert drawn.tokens[1] == scores[-1].argmax()
  np.testing.assert_allclose(drawn.logprob[1], scores[-1].max(), atol=2e-5)
  text = [*prompt[:2], first, *other]
  scores = np.asarray(scores_of_text(padded(text[:length], length)))
  found = scores[1 : len(text) - 1].argmax(1).tolist()
  assert found == [first, *other]


def test_an_engine_serves_what_a_request_gets_alone():
  run, told = programs('small'), Told()
  engine = Engine(lambda tell: run, Letters(), prefix_bytes=20_000)
  engine.start()
  jobs = [
    Job(id=f'{i}', tokens=tuple(text), max_tokens=MAX_TOKENS, sampling=how)
    for i, (text, how) in enumerate(zip(prompts(), SAMPLINGS, strict=True))
  ]
  while engine.state == 'starting':
    time.sleep(0.01)
  for turn in range(3):
    copies = [dataclasses.replace(x, id=f'{turn} {x.id}') for x in jobs]
    for job in reversed(copies) if turn == 1 else copies:
      engine.submit(job, told)
    found = {i: list(told.tokens(x.id)) for i, x in enumerate(copies)}
    assert found == alone('small')
  # Prompts were read once but for their ends.
  num_shared = sum((n - 1) // C * C for n in PROMPTS)
  assert engine.stats().prefix_cache_hits == 2 * num_shared
  assert engine.drain(10)
