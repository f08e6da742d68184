# SPDX-License-Identifier: Apache-2.0
"""Scores are those of one sequence alone, whatever stands beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scored_models
from lanes import few
from scored_models import MODELS, check, params, scorer, sequences, slowly

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.evaluation import programs
from jaxsparse.evaluation.encoding import Encoded
from jaxsparse.evaluation.scorer import Scorer
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.text import Request
from jaxsparse.nn.transformer import init_params

ODD = sequences((13, 5), (1, 1), (6, 6), (11, 1), (3, 2))


def beginnings(name):
  """What the slow way makes of `ODD`: of the longest, and of its beginnings."""
  tokens = ODD[0].tokens
  logits = scored_models.logits_of(name)(params(name), tokens[None, :-1])
  logits = np.asarray(logits)[0]
  return [scored_models.judged(logits[: s.length], s) for s in ODD]


@pytest.mark.parametrize('name', few(['memory'], MODELS))
def test_padding_and_neighbours_are_of_no_matter(name):
  """Of experts, memories with convolutions, sparse and local attention."""
  check(scorer(name).scores(ODD), beginnings(name))


def test_results_are_in_the_order_given():
  expected = beginnings('dense')
  of_all = scorer('dense').scores([*ODD, *ODD[::-1]])
  check(of_all, [*expected, *expected[::-1]])


def test_the_greedy_are_told():
  (whole,) = sequences((13, 1))
  tokens = whole.tokens.copy()
  logits = scored_models.logits_of('dense')(params('dense'), tokens[None, :-1])
  tokens[-1] = np.argmax(logits[0, -1])
  likeliest, two = Encoded(tokens, 1), Encoded(tokens, 2)
  greedy = [
    s.is_greedy for s in scorer('dense').scores([likeliest, two, whole])
  ]
  assert greedy == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_lengths_of_several_programs(name):
  """Each against a program of just its length."""
  found = sequences((1, 1), (7, 3), (16, 16), (17, 2), (31, 5))
  check(scorer(name).scores(found), [slowly(name, s) for s in found])


@pytest.mark.parametrize('name', few(['untied'], ['untied', 'all']))
def test_on_eight_devices(name):
  devices = mesh.make_mesh(2, 2, 2)
  placed = mesh.abstract(
    lambda: init_params(MODELS[name], jax.random.key(0)), mesh=devices
  )
  placed = jax.tree.map(
    lambda x, on: jax.device_put(x, on.sharding), params(name), placed
  )
  with jax.set_mesh(devices):
    found = Scorer(MODELS[name], placed, ByteTokenizer(), 16, 64).scores(ODD)
  check(found, beginnings(name))


def test_logits_of_all_positions_are_never_held(monkeypatch):
  rows, length, vocab_size = 8, 64, 20_000
  monkeypatch.setattr(programs, '_MOST_BYTES', 4 * rows * vocab_size)
  model = dataclasses.replace(scored_models.DENSE, vocab_size=vocab_size)
  array = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  of_rows = jax.ShapeDtypeStruct((rows,), jnp.int32)
  program = programs.score.lower(
    model,
    jax.eval_shape(lambda: init_params(model, jax.random.key(0))),
    array,
    array,
    of_rows,
    of_rows,
  ).compile()
  held = program.memory_analysis().temp_size_in_bytes
  assert held < 4 * rows * length * vocab_size / 4


def test_sizes_of_batches_and_chunks_are_of_no_matter(monkeypatch):
  monkeypatch.setattr(programs, '_MOST_BYTES', 4 * 8 * 257 * 4)
  assert programs._chunk_size(8, 16, 257) == 4
  # Of eight rows, for which nothing has been compiled.
  check(scorer('dense', 128).scores(ODD), beginnings('dense'))


def test_all_next_tokens_together_are_certain():
  context = ODD[0].tokens[:6]
  found = scorer('dense', 16 * 16).scores(
    [Encoded(np.append(context, token), 1) for token in range(257)]
  )
  assert sum(np.exp(s.logprob) for s in found) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_greedy_is_what_temperature_zero_writes():
  """And a text is cut before its stop string."""
  of_model = scorer('dense')
  greedy = Sampling(temperature=0.0)
  prompt = 'ab'
  (text,) = of_model.generate(
    [Request(prompt=prompt, max_tokens=4, sampling=greedy)]
  )
  written = text.encode()
  context = [256, *prompt.encode()]
  token = int(
    np.argmax(
      scored_models.logits_of('dense')(
        params('dense'), np.array([context], np.int32)
      )[0, -1]
    )
  )
  others = [t for t in (token, 65, 66) if t < 256]
  found = of_model.scores(
    [Encoded(np.array([*context, t], np.int32), 1) for t in others]
  )
  assert [s.is_greedy for s in found] == [t == token for t in others]
  if token < 128:
    assert written[0] == token


def test_a_uniform_model():
  """log2 257 bits for each byte, and 257 as perplexity of each."""
  nothing = jax.tree.map(jnp.zeros_like, params('dense'))
  uniform = Scorer(MODELS['dense'], nothing, ByteTokenizer(), 16, 64)
  text = 'a text of many bytes, four windows long: 50 bytes.'
  (total,) = uniform.rolling([text])
  assert -total / 50 / np.log(2) == pytest.approx(8.005625, abs=1e-5)
  score = uniform.loglikelihoods([('What', ' is')] * 4)[0]
  assert np.exp(-score.logprob) == pytest.approx(257**3, rel=1e-4)


def test_probabilities_that_are_no_numbers_are_told():
  broken = jax.tree.map(lambda x: x * np.nan, params('dense'))
  with pytest.raises(UserError, match='no numbers'):
    Scorer(MODELS['dense'], broken, ByteTokenizer(), 16, 64).scores(ODD)
