"""The pictures are drawn from full, partial and empty artefacts alike."""

import numpy as np
import pytest

from jaxsparse.analysis import plots

TRAIN = [
  {
    'step': step,
    'loss': 3 - step / 100,
    'bits_per_byte': 4 - step / 100,
    'learning_rate': 1e-3,
    'value_learning_rate': 1e-2,
    'tokens_per_second': 5000.0,
    'block_01/memory/slots_used': 0.5,
    'block_01/memory/unevenness': 1.5,
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
    [],
  ],
)
def test_training_picture(rows, tmp_path):
  path = tmp_path / 'plots' / 'training.png'
  plots.plot_training(rows, path, {'gzip': 2.5, 'xz': 2.1})
  assert _is_picture(path)


@pytest.mark.parametrize('rows', [TRAIN, []])
@pytest.mark.parametrize(
  'counts',
  [
    {'block_01': np.arange(64), 'block_05': np.repeat([0, 9], 32)},
    {'block_01': np.zeros(64, np.int64)},
    {},
  ],
)
def test_slot_usage_picture(counts, rows, tmp_path):
  path = tmp_path / 'slots.png'
  plots.plot_slot_usage(counts, path, rows)
  assert _is_picture(path)


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
    plots._smooth(np.array([1.0, 2.0, 6.0, 7.0]), 2), [1, 1.5, 4, 6.5]
  )


def test_thinned_curve_keeps_both_ends():
  index = plots._log_spaced(1_000_000)
  assert len(index) <= 2000
  assert (index[0], index[-1]) == (0, 999_999)
  assert np.all(np.diff(index) > 0)
