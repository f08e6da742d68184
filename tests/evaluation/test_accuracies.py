# SPDX-License-Identifier: Apache-2.0
"""Metrics against numbers that were computed by hand."""

import dataclasses
import math

import numpy as np
import pytest

from jaxsparse.evaluation import metrics, table
from jaxsparse.evaluation.metrics import Choices, Metric
from jaxsparse.evaluation.run import Result

CHOICES = (' a dog', ' an elephant', ' é')
QUESTION = Choices(
  logprobs=(-2.5, -2.7, -2.4),
  chars=[len(c) for c in CHOICES],
  num_bytes=[len(c.encode()) for c in CHOICES],
  num_tokens=(2, 3, 1),
  scored_bytes=[len(c.encode()) for c in CHOICES],
  gold=1,
  are_greedy=(False, False, True),
  unconditional=(-4.0, -9.0, -2.5),
)


def test_what_each_accuracy_picks():
  assert metrics.picks(QUESTION) == dict(
    acc=2, acc_norm=1, acc_bytes=1, acc_per_token=1, acc_pmi=1
  )


def test_characters_are_not_bytes():
  """Two characters of 1.2 nats each lose to one in which they are three."""
  other = dataclasses.replace(QUESTION, logprobs=(-9.0, -3.0, -0.6))
  picked = metrics.picks(other)
  assert picked['acc_norm'] == 1
  assert picked['acc_bytes'] == 2


def test_values_of_one_question():
  found = metrics.of_questions([QUESTION])
  values = {name: metric.value for name, metric in found.items()}
  assert values.pop('bits_per_byte') == pytest.approx(0.324607, abs=1e-6)
  assert values == dict(
    acc=0, acc_norm=1, acc_bytes=1, acc_per_token=1, acc_pmi=1
  )
  assert all(
    metric.chance == pytest.approx(1 / 3)
    for name, metric in found.items()
    if name != 'bits_per_byte'
  )
  assert all(metric.error is None for metric in found.values())


def test_of_equal_choices_the_first_is_taken():
  """So a model that knows nothing is right where gold is first."""
  golds = (0, 1, 0, 2, 0)
  uniform = [
    dataclasses.replace(QUESTION, logprobs=(-3.0,) * 3, gold=gold)
    for gold in golds
  ]
  assert metrics.of_questions(uniform)['acc'].value == pytest.approx(3 / 5)


def test_without_a_question_there_is_no_pmi():
  plain = dataclasses.replace(QUESTION, unconditional=None)
  assert 'acc_pmi' not in metrics.of_questions([QUESTION, plain])


def test_the_error_of_an_accuracy():
  accuracy = Metric.mean([1.0] * 60 + [0.0] * 40)
  assert accuracy.error == pytest.approx(0.049237, abs=1e-6)


def test_two_documents_are_summed_first():
  found = metrics.of_texts([-10.0, -30.0], [8, 40], num_words=9)
  assert found['bits_per_byte'].value == pytest.approx(1.202246, abs=1e-6)
  assert found['byte_perplexity'].value == pytest.approx(math.exp(40 / 48))
  assert found['word_perplexity'].value == pytest.approx(math.exp(40 / 9))


def test_the_error_of_a_ratio():
  """That of 2,000 drawings of the documents with replacement."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(50, 200, 100)
  parts = sizes * rng.normal(2.0, 0.5, 100)
  drawn = rng.integers(0, 100, (2000, 100))
  ratios = parts[drawn].sum(1) / sizes[drawn].sum(1)
  assert Metric(parts, sizes).error == pytest.approx(ratios.std(), rel=0.06)


def test_completions():
  """Greedy or not, and perplexity per item: not per token."""
  one = Choices((-1.0,), (4,), (4,), (3,), (5,), 0, (True,))
  other = Choices((-3.0,), (4,), (4,), (1,), (5,), 0, (False,))
  found = metrics.of_questions([one, other])
  assert found['acc'].value == 0.5
  assert found['acc'].chance == 0
  assert found['perplexity'].value == pytest.approx(math.exp(2.0))
  # exp(2) times the error of a mean of 1 and 3, which is 1.
  assert found['perplexity'].error == pytest.approx(math.exp(2.0))
  bits = 0.5 * (1 / 5 + 3 / 5) / math.log(2)
  assert found['bits_per_byte'].value == pytest.approx(bits)


def test_paired_differences():
  """What two models have in common does not blur what divides them."""
  rng = np.random.default_rng(0)
  difficulty = rng.normal(0, 5, 200)
  one = Metric.mean(difficulty + rng.normal(0.3, 0.1, 200))
  other = Metric.mean(difficulty)
  difference = one.minus(other)
  assert difference.value == pytest.approx(one.value - other.value)
  assert difference.error < 0.1 < one.error
  expected = np.std(one.parts - other.parts, ddof=1) / math.sqrt(200)
  assert difference.error == pytest.approx(expected)


def test_contexts_that_either_model_cut_are_told():
  found = {'acc': Metric.mean([0.0, 1.0])}
  whole, cut = (Result('animals', 2, n, found) for n in (0, 1))
  said = 'animals: 1 of 2 lost the beginning of a context, which is longer than'
  assert said not in table.of_differences([whole], [whole])
  shown = table.of_differences([cut], [whole])
  assert f'{said} the model reads' in shown
  shown = table.of_differences([whole], [cut])
  assert f'{said} the other model reads' in shown


def test_no_difference_where_items_differ():
  windows = Metric(np.ones(2), np.array([8.0, 40.0]))
  assert windows.minus(Metric(np.ones(3), np.ones(3))) is None
  assert windows.minus(Metric(np.ones(2), np.array([40.0, 8.0]))) is None
  perplexity = Metric.mean([1.0, 2.0], is_exponential=True)
  assert perplexity.minus(perplexity) is None
