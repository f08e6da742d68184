# SPDX-License-Identifier: Apache-2.0
"""The page of results about pictures with their texts."""

import numpy as np
from results_tables import load, machine, table

NAME = 'multimodal'
_SIDES = (
  'captions_recall_at_1', 'captions_recall_at_10',
  'pictures_recall_at_1', 'pictures_recall_at_10',
)  # fmt: skip
_HEAD = ['picture -> text R@1', 'R@10', 'text -> picture R@1', 'R@10']
_BASELINES = dict(
  chance='chance', mean_colour='mean colour', pixels_linear='pixels, linear'
)


def _cells(runs):
  """Mean of the seeds, and each where there are several."""
  found = [[run[side] for run in runs] for side in _SIDES]
  return [
    f'{np.mean(x):.3f}'
    + (f' ({", ".join(f"{v:.3f}" for v in x)})' if len(x) > 1 else '')
    for x in found
  ]


def _split(name):
  found = load(NAME)['emoji'][name]
  rows = [['the model', *_cells(found['runs'])]]
  for key, what in _BASELINES.items():
    rows.append([what, *_cells([found['baselines'][key]])])
  return table(['', *_HEAD], rows), found
