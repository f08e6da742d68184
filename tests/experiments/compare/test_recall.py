# SPDX-License-Identifier: Apache-2.0
"""Recall of models that are known to know everything, something or nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.config import ModelConfig
from jaxsparse.data import facts, tokenizer
from jaxsparse.experiments.compare import recall
from jaxsparse.nn.transformer import Transformer

PEOPLE = facts.make_people(30, 0)
BYTES = tokenizer.ByteTokenizer()


pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  path = tmp_path_factory.mktemp('facts') / 'tokenizer.json'
  path.write_text(facts.make_tokenizer().to_str())
  return tokenizer.load_from_workdir(path.parent)


def oracle(vocab_size, sharpness=50.0):
  """Knows every target."""
  return lambda batch: sharpness * one_hot(batch['targets'], vocab_size)


@functools.partial(jax.jit, static_argnums=1)
def one_hot(tokens, vocab_size):
  return jax.nn.one_hot(tokens, vocab_size)


@pytest.mark.parametrize('batch_size', [7, 200])
def test_who_knows_all_recalls_all(words, batch_size):
  found = recall.measure(oracle(words.vocab_size), words, PEOPLE, batch_size)
  assert found.share == 1
  assert found.facts == 30 * 6
  assert math.isclose(found.bits, PEOPLE.bits, rel_tol=1e-5)
  assert set(found.share_by_attribute.values()) == {1.0}


def test_answers_of_many_tokens_count_whole():
  all_known = recall.measure(oracle(BYTES.vocab_size), BYTES, PEOPLE)
  assert (all_known.share, all_known.facts) == (1, 180)
  assert math.isclose(all_known.bits, PEOPLE.bits, rel_tol=1e-5)

  def knows_no_e(batch):
    targets = np.asarray(batch['targets'])
    known = np.where(targets == ord('e'), 0, targets)
    return 50.0 * one_hot(known, BYTES.vocab_size)

  answers = [question.answer for question in PEOPLE.questions()]
  found = recall.measure(knows_no_e, BYTES, PEOPLE)
  assert found.facts == sum('e' not in answer for answer in answers)


def test_even_guesses_among_the_values_store_nothing(words):
  logits = np.full(words.vocab_size, -50.0)
  values = {value for a in facts.ATTRIBUTES for value in a.values}
  for value in values:
    logits[words.encode(value)[0]] = 0.0

  def guess(batch):
    shape = (*batch['targets'].shape, words.vocab_size)
    return jnp.broadcast_to(jnp.asarray(logits, jnp.float32), shape)

  found = recall.measure(guess, words, PEOPLE)
  # All values are alike, so more are in question than an attribute has.
  assert found.bits == 0
  assert found.share < 0.1


def test_half_of_a_bit_counts_half(words):
  """True values and one wrong one at even odds: one bit of each is missing."""

  def torn(batch):
    targets = np.asarray(batch['targets'])
    true = one_hot(targets, words.vocab_size)
    wrong = one_hot((targets + 1) % 500, words.vocab_size)
    return 50.0 * (true + wrong)

  found = recall.measure(torn, words, PEOPLE)
  assert math.isclose(found.bits, PEOPLE.bits - 30 * 6, rel_tol=1e-4)


def test_a_model_is_asked_as_it_was_trained(words):
  config = ModelConfig(
    num_layers=1,
    model_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    vocab_size=words.vocab_size,
  )
  zeros = np.zeros((1, 4), np.int32)
  init = jax.jit(Transformer(config).init)
  params = init(jax.random.key(0), zeros, zeros, zeros)
  params = params['params']
  forward = recall.model_forward(config, params)
  question = next(PEOPLE.questions())
  tokens = words.encode(question.before + question.answer)
  positions = np.arange(4, dtype=np.int32)[None]
  logits, _, _ = jax.jit(Transformer(config).apply)(
    {'params': params},
    tokens[None, :4],
    positions,
    np.ones_like(positions),
  )
  one = facts.People(PEOPLE.names[:1], PEOPLE.values[:1])
  found = recall.measure(forward, words, one, batch_size=6)
  is_right = np.argmax(np.asarray(logits)[0, -1]) == tokens[4]
  assert found.share_by_attribute['birth city'] == is_right
  assert found.bits == 0
