# SPDX-License-Identifier: Apache-2.0
"""The pictures are drawn from full, partial and empty artefacts alike."""

import numpy as np
import pytest
from matplotlib import figure

from jaxsparse.analysis import plots

TRAIN = [
  {
    'step': step,
    'loss': 3 - step / 100,
    'bits_per_byte': 4 - step / 100,
    'learning_rate': 1e-3,
    'value_learning_rate': 1e-2,
    'tokens_per_second': 5000.0,
    'block_01/memory/usage_fraction': 0.5,
    'block_01/memory/usage_kl': 1.5,
  }
  for step in range(0, 100, 10)
]
VALIDATION = [{'step': 90, 'validation_bits_per_byte': 3.5}]


def _is_picture(path):
  content = path.read_bytes()
  return content.startswith(b'\x89PNG') and len(content) > 10_000


@pytest.mark.parametrize(
  'rows',
  [
    TRAIN + VALIDATION,
    TRAIN[:1],
    [{'step': 1, 'loss': 3.0}],
    [{'step': 1, 'loss': None, 'bits_per_byte': float('nan')}],
    VALIDATION,
    [x | {'old_validation_bits_per_byte': 3.0} for x in VALIDATION],
    [],
  ],
)
def test_training_picture(rows, tmp_path):
  path = tmp_path / 'plots' / 'training.png'
  plots.plot_training(rows, path, {'gzip': 2.5, 'xz': 2.1})
  assert _is_picture(path)


@pytest.mark.parametrize(
  ('rows', 'axis', 'told'),
  [
    ([dict(step=9, validation_loss=2.0)], 'nats per token', 'validation (2.0'),
    (
      [dict(step=9, validation_loss=0.2, validation_captions_recall_at_1=0.8)],
      'loss',
      'validation: 1 - mean R@1 (0.2',
    ),
    (
      [dict(step=9, validation_loss=0.2, validation_caption_loss=0.2)],
      'loss',
      'validation: nats per token of captions (0.2',
    ),
  ],
)
def test_a_loss_says_what_it_is(rows, axis, told):
  axes = figure.Figure().add_subplot()
  plots._plot_loss(axes, rows, {})
  assert axes.get_ylabel() == axis
  assert axes.get_legend_handles_labels()[1][0].startswith(told)


def test_series_keeps_finite_numbers_only():
  rows = [
    {'step': 1, 'loss': 3.0},
    {'step': 2},
    {'step': 3, 'loss': None},
    {'step': 4, 'loss': float('inf')},
    {'step': 5, 'loss': 2},
  ]
  steps, values = plots._series(rows, 'loss')
  np.testing.assert_array_equal(steps, [1, 5])
  np.testing.assert_array_equal(values, [3, 2])


def test_smoothing_is_a_running_mean():
  np.testing.assert_allclose(
    plots.smooth(np.array([1.0, 2.0, 6.0, 7.0]), 2), [1, 1.5, 4, 6.5]
  )


def test_names_at_the_ends_of_lines_do_not_touch():
  rng = np.random.default_rng(0)
  for size in range(1, 9):
    places = np.sort(rng.uniform(size=size))
    apart = plots.spread_out(places.tolist(), 0.05)
    assert np.all(np.diff(apart) >= 0.05 - 1e-9)
    # They move around their mean, and not at all where there is room.
    assert apart.mean() == pytest.approx(places.mean())
  np.testing.assert_allclose(plots.spread_out([0.1, 0.5], 0.05), [0.1, 0.5])


def test_layers_have_colours_of_their_own():
  for size in (1, 7, 8, 30):
    layers = [f'block_{i:02}' for i in range(size)]
    colours = plots.layer_colours(layers)
    assert list(colours) == layers
    assert len({tuple(np.ravel(colour)) for colour in colours.values()}) == size
