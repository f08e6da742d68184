# SPDX-License-Identifier: Apache-2.0
"""The picture of slots is drawn from whatever counts there are."""

import numpy as np
import pytest
from pictures import figures, texts

from jaxsparse.analysis import usage_pictures

ROWS = [
  {
    'step': step,
    'block_01/memory/usage_fraction': 0.5,
    'block_01/memory/usage_kl': 1.5,
  }
  for step in range(0, 100, 10)
]


@pytest.mark.parametrize('rows', [ROWS, []])
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
  usage_pictures.plot_slot_usage(counts, path, rows)
  assert path.read_bytes().startswith(b'\x89PNG')


def test_it_says_where_a_layer_is_and_what_the_divergence_means(
  tmp_path, monkeypatch
):
  written = figures(monkeypatch)
  names = {'block_01': 'memory of block 1, added after block 4'}
  counts = {'block_01': np.repeat([9, 0], 32)}
  usage_pictures.plot_slot_usage(counts, tmp_path / 'a.png', ROWS, names)
  said = texts(written[0])
  (label,) = {t for t in said if t.startswith(names['block_01'])}
  assert label.endswith('50.0% used, KL 0.69')
  assert any('0: all slots are read alike' in text for text in said)


def test_thinned_curve_keeps_both_ends():
  index = usage_pictures._log_spaced(1_000_000)
  assert len(index) <= 2000
  assert (index[0], index[-1]) == (0, 999_999)
  assert np.all(np.diff(index) > 0)
