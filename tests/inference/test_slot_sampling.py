# SPDX-License-Identifier: Apache-2.0
"""Sampling by arrays against sampling one row at a time, and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.inference import slot_sampling
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.sampling import Sampling, sample

V, BOUNDARY = 37, 3
# A second one, of chats; and one that only the tokenizer has.
STOP_IDS = (BOUNDARY, 30, V + 5)
ALL = np.full((1, 2), 2**32 - 1, np.uint32)
draw = jax.jit(slot_sampling.draw)
draw_sorted = jax.jit(slot_sampling.draw_sorted, static_argnames='stop_ids')


def rows(*samplings, num_drawn=0, **arrays):
  """Arrays of slots with these fields, one row each."""
  parts = []
  for sampling in samplings:
    part = slot_sampling.init(1, V)
    part = slot_sampling.taken_over(part, slot_sampling.of_job(sampling))
    parts.append(part._replace(num_drawn=np.array([num_drawn], np.int32)))
  joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
  return joined._replace(**arrays)


def logits_of(num_rows, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(0, 2, (num_rows, V)).astype(np.float32)


def drawn_sorted(logits, sampling, mask=None):
  mask = np.repeat(ALL, len(logits), axis=0) if mask is None else mask
  return np.asarray(draw_sorted(logits, sampling, stop_ids=STOP_IDS, mask=mask))


LIMITS = [
  dict(temperature=0.0),
  dict(temperature=1.0),
  dict(temperature=0.3),
  dict(top_k=4),
  dict(top_p=0.6),
  dict(temperature=2.5, top_k=9, top_p=0.7),
  dict(top_k=V + 5, top_p=0.95),
]


@pytest.mark.parametrize('step', [0, 5])
def test_a_slot_draws_as_one_row_does(step):
  """Whatever else is drawn beside it, and by which of the programs."""
  seeds = [0, 1, 2**31, 2**32 - 1]
  jobs = [(limits, seed) for limits in LIMITS for seed in seeds]
  sampling = rows(
    *(JobSampling(**limits, seed=seed) for limits, seed in jobs),
    num_drawn=step,
  )
  logits = logits_of(len(jobs))
  expected = []
  for row, (limits, seed) in zip(logits, jobs, strict=True):
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), step)
    expected.append(int(sample(row[None], key, Sampling(**limits))[0]))
  found = drawn_sorted(logits, sampling)
  np.testing.assert_array_equal(found, expected)
  order = np.random.default_rng(1).permutation(len(jobs))
  shuffled = jax.tree.map(lambda x: x[order], sampling)
  np.testing.assert_array_equal(
    drawn_sorted(logits[order], shuffled), found[order]
  )
  plain = [JobSampling(**limits).form == 'plain' for limits, _ in jobs]
  assert 0 < sum(plain) < len(jobs)
  by_plain = np.asarray(draw(logits, sampling))
  np.testing.assert_array_equal(by_plain[plain], found[plain])


def test_random_tokens_are_as_frequent_as_they_are_probable():
  n = 4000
  logits = np.repeat(logits_of(1), n, axis=0)
  samplings = rows(*[JobSampling(min_p=0.05)])
  samplings = jax.tree.map(lambda x: np.repeat(x, n, axis=0), samplings)
  samplings = samplings._replace(seed=np.arange(n, dtype=np.uint32))
  found = np.bincount(drawn_sorted(logits, samplings), minlength=V) / n
  probability = np.exp(logits[0]) / np.exp(logits[0]).sum()
  probability[probability < 0.05 * probability.max()] = 0
  probability /= probability.sum()
  assert np.all(found[probability == 0] == 0)
  np.testing.assert_allclose(found, probability, atol=0.035)


def best(logits, sampling, **kwargs):
  return drawn_sorted(logits, sampling, **kwargs).tolist()


def test_penalties_are_their_formulas():
  rng = np.random.default_rng(2)
  fields = dict(
    temperature=0.0, repetition_penalty=1.7, presence_penalty=0.4,
    frequency_penalty=0.3,
  )  # fmt: skip
  num_rows = 64
  counts = rng.integers(0, 4, (num_rows, V)).astype(np.int16)
  in_prompt = rng.random((num_rows, V)) < 0.3
  sampling = rows(
    *[JobSampling(**fields)] * num_rows, counts=counts, in_prompt=in_prompt
  )
  logits = logits_of(num_rows)
  expected = np.where(logits > 0, logits / 1.7, logits * 1.7)
  expected = np.where((counts > 0) | in_prompt, expected, logits)
  expected = expected - 0.4 * (counts > 0) - 0.3 * counts
  assert best(logits, sampling) == expected.argmax(1).tolist()
  assert (expected.argmax(1) != logits.argmax(1)).mean() > 0.3


def test_biases_masks_and_the_least_number_of_tokens():
  logits = np.zeros((1, V), np.float32)
  logits[0, [5, BOUNDARY, 30, 36, 9]] = 4, 3, 2.5, 2, 1
  greedy = dict(temperature=0.0)
  biased = JobSampling(**greedy, logit_bias=((5, -2.5), (36, 1.25), (9, 0.5)))
  assert best(logits, rows(biased)) == [36]
  late = JobSampling(**greedy, min_tokens=2, logit_bias=((5, -100.0),))
  for num_drawn, expected in ((0, 36), (1, 36), (2, BOUNDARY), (3, BOUNDARY)):
    assert best(logits, rows(late, num_drawn=num_drawn)) == [expected]
  for allowed in ([36], [9, 36], [0], [9, BOUNDARY]):
    mask = np.zeros((1, 2), np.uint32)
    for token in allowed:
      mask[0, token // 32] |= np.uint32(1 << token % 32)
    expected = max(allowed, key=lambda token: logits[0, token])
    assert best(logits, rows(JobSampling(**greedy)), mask=mask) == [expected]
    random = JobSampling(seed=1, top_k=30)
    assert best(logits, rows(random), mask=mask)[0] in allowed


def test_what_was_drawn_is_counted_of_live_slots():
  sampling = slot_sampling.init(3, V)
  tokens = jnp.array([5, 5, 7])
  is_live = jnp.array([True, False, True])
  for counts in (True, True, False):
    sampling = slot_sampling.with_drawn(sampling, tokens, is_live, counts)
  np.testing.assert_array_equal(sampling.num_drawn, [3, 0, 3])
  assert sampling.counts.sum() == 4
  assert sampling.counts[0, 5] == sampling.counts[2, 7] == 2
  full = jnp.full_like(sampling.counts, 2**15 - 1)
  sampling = sampling._replace(counts=full)
  sampling = slot_sampling.with_drawn(sampling, tokens, is_live, True)
  assert sampling.counts.min() == 2**15 - 1


def test_log_probabilities_are_of_the_logits_as_they_are():
  logits = logits_of(2)
  logprobs = jax.nn.log_softmax(logits)
  found = jax.jit(slot_sampling.best_of)(logits, np.array([4, 9], np.int32))
  np.testing.assert_allclose(found.logprob, logprobs[[0, 1], [4, 9]], rtol=1e-6)
  order = np.argsort(-logits, axis=1)[:, : slot_sampling.MOST_BEST]
  np.testing.assert_array_equal(found.top_ids, order)
  # The likeliest token's is the first one's, bit for bit.
  greedy = slot_sampling.best_of(logits, order[:, 0].astype(np.int32))
  np.testing.assert_array_equal(greedy.logprob, greedy.top_logprobs[:, 0])
