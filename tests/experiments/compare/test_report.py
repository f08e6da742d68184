# SPDX-License-Identifier: Apache-2.0
"""Statistics over seeds, and the tables and pictures made of them."""

import dataclasses

import numpy as np
import pytest
from pictures import figures, texts
from small_suite import facts_suite

from jaxsparse.data.needles import Needles
from jaxsparse.experiments.compare import pictures, report
from jaxsparse.experiments.compare.suite import Architecture


def result(architecture, seed, people=0, **fields):
  return (
    dict(
      architecture=architecture,
      seed=seed,
      people=people,
      sizes='MLP 4',
      parameters=2e6,
      flops_per_token=3e6,
      tokens_per_second=1000.0 + seed,
      training_loss=1.0,
      validation_loss=1.0,
      bits_per_byte=2.0,
      curve=[[1.0, 3.0], [2.0, 2.0]],
    )
    | fields
  )


def test_spread_of_seeds():
  spread = report.Spread((1.0, 3.0, 2.0))
  assert (spread.mean, spread.low, spread.high, spread.std) == (2, 1, 3, 1)
  assert spread.text('.1f') == '2.0 (1.0 to 3.0; ± 1.0)'
  assert report.Spread((1.5,)).text('.2f') == '1.50'


@pytest.fixture
def language(tmp_path):
  """Without people, so that the text is Python's own."""
  return facts_suite(tmp_path, people=())


def test_language_table_has_losses_with_spread(language, tmp_path):
  results = [
    result('dense', 0, validation_loss=1.5),
    result('dense', 1, validation_loss=1.7),
    result('ultramem', 0, validation_loss=1.25),
  ]
  table = report.write(language, results, tmp_path)
  assert '1.6000 (1.5000 to 1.7000; ± 0.1414)' in table
  assert '| ultramem | MLP 4 | 2M | 3M | 1.2500 |' in table
  drawn = pictures.draw(language, results, tmp_path / 'plots')
  assert [path.name for path in drawn] == ['loss.png', 'seeds.png']
  assert all(path.exists() for path in drawn)


def test_losses_are_drawn_as_differences_seed_by_seed(
  language, tmp_path, monkeypatch
):
  """No bar begins anywhere, no legend tells colours apart."""
  results = [
    result('dense', 0, validation_loss=1.5),
    result('dense', 1, validation_loss=1.7),
    result('ultramem', 0, validation_loss=1.25),
    result('ultramem', 1, validation_loss=1.55),
  ]
  written = figures(monkeypatch)
  pictures.draw(language, results, tmp_path)
  curves, seeds = written
  assert [axes.get_title('left') for axes in curves.axes] == [
    'dense',
    'ultramem',
  ]
  (axes,) = seeds.axes
  assert not axes.patches
  assert 'lower is better' in seeds.get_suptitle()
  dots = [line.get_xdata() for line in axes.lines if line.get_marker() == 'o']
  np.testing.assert_allclose(dots, [[-0.25, -0.15]])
  said = texts(seeds)
  assert {'dense  1.600', 'ultramem  1.400', '\N{MINUS SIGN}0.200'} <= {*said}
  for figure in written:
    assert not any(axes.get_legend() for axes in figure.axes)


def test_losses_without_common_seeds_are_drawn_as_they_are(
  language, tmp_path, monkeypatch
):
  results = [
    result('dense', 0, validation_loss=1.5),
    result('ultramem', 1, validation_loss=1.25),
  ]
  written = figures(monkeypatch)
  pictures.draw(language, results, tmp_path)
  assert {'1.500', '1.250'} <= {*texts(written[1])}
  assert written[1].get_suptitle().startswith('Validation loss, nats')


def test_walk_shows_each_step_beside_what_was_published(language):
  architectures = dict(language.architectures)
  architectures['further'] = Architecture(
    memory=architectures['ultramem'].memory, published=(-0.034, 0.001)
  )
  suite = dataclasses.replace(
    language, architectures=architectures, is_walk=True
  )
  results = [
    result('ultramem', 0, validation_loss=1.5),
    result('ultramem', 1, validation_loss=1.7),
    result('further', 0, validation_loss=1.4, training_loss=0.8),
  ]
  row = report.tables(suite, results).splitlines()[-1]
  # Only the seed that both have.
  assert '| -0.2000 | -0.1000 | -0.034 | +0.001 |' in row


def test_facts_tables_compare_the_most_that_is_held(tmp_path):
  suite = facts_suite(tmp_path, people=(10, 100))
  results = [
    result(
      name,
      seed,
      people,
      num_facts=6 * people,
      exposures=5.0,
      recall=held / 6 / people,
      facts_recalled=held,
      bits=5.0 * held,
      bits_per_parameter=held / 1000,
    )
    for seed in (0, 1)
    for people in (10, 100)
    for name, held in (('dense', 30), ('ultramem', 0.9 * people + 10 * seed))
  ]
  text = report.write(suite, results, tmp_path)
  assert 'of 600 (5x seen)' in text
  row = (
    '| ultramem | 95 (90 to 100; ± 7) | 3.17x | 95 (90 to 100; ± 7) | 3.17x |'
  )
  assert row in text
  assert len(pictures.draw(suite, results, tmp_path)) == 3


def test_needles_table_compares_what_is_found(tmp_path):
  documents = Needles(num_needles=5, num_fillers=0, gap=0)
  suite = facts_suite(tmp_path, people=())
  data = dataclasses.replace(suite.base.data, seq_len=documents.seq_len)
  base = dataclasses.replace(suite.base, data=data)
  suite = dataclasses.replace(suite, base=base, needles=documents)
  results = [
    result(name, seed, needles_found=share, needles_found_by_depth=[share] * 4)
    for name, seed, share in (
      ('dense', 0, 0.8),
      ('dense', 1, 1.0),
      ('ultramem', 0, 0.45),
    )
  ]
  table = report.write(suite, results, tmp_path)
  assert '| dense | 90.0% (80.0% to 100.0%; ± 14.1%) | 1.00x |' in table
  assert '| ultramem | 45.0% | 0.50x |' in table
  drawn = pictures.draw(suite, results, tmp_path / 'plots')
  assert [path.stem for path in drawn] == ['loss', 'seeds', 'depth']


def test_only_some_runs_are_no_trouble(tmp_path):
  suite = facts_suite(tmp_path, people=(10, 100))
  fields = dict(num_facts=60, exposures=5.0, recall=0.5, facts_recalled=30)
  fields |= dict(bits=9.0, bits_per_parameter=0.1)
  results = [result('ultramem', 0, 10, **fields)]
  assert '| ultramem | 30 | - | 30 | - |' in report.tables(suite, results)
  assert len(pictures.draw(suite, results, tmp_path)) == 3
