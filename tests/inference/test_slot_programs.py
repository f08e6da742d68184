# SPDX-License-Identifier: Apache-2.0
"""Slots as an engine drives them: what a request gets hangs on it alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from slot_models import MODELS, V, make_params

from jaxsparse.inference.jobs import JobSampling
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
kinds = pytest.mark.parametrize(
  'name', few(['convolved'], [name for name in MODELS if name != 'indexed'])
)


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
    chunks=(C, 2),
    history_blocks=blocks or None,
    boundary_id=0,
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
def alone(name):
  """Tokens of each job as they are drawn offline, token after token."""
  config = MODELS[name]
  params = jax.tree.map(jnp.asarray, make_params(config))

  @jax.jit
  def logits_of(tokens):
    at = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    cache = init_cache(config, 1, LENGTH)
    ones = jnp.ones_like(at)
    return Transformer(config).apply(params, tokens, at, ones, cache)[0]

  found = {}
  for job, (prompt, how) in enumerate(zip(prompts(), SAMPLINGS, strict=True)):
    text = list(prompt)
    sampling = Sampling(
      temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
    )
    for step in range(MAX_TOKENS):
      padded = np.zeros((1, LENGTH), np.int32)
      padded[0, : len(text)] = text
      last = logits_of(padded)[:, len(text) - 1]
      key = jax.random.fold_in(jax.random.key(np.uint32(how.seed)), step)
      text.append(int(sample(last, key, sampling)[0]))
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
