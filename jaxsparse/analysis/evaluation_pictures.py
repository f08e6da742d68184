# SPDX-License-Identifier: Apache-2.0
"""Evaluations as a picture: accuracies and bits per byte with their errors."""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsparse.analysis import plots

# Of the accuracies the one that is drawn, by character of the choices: it does
# not favour short ones.
_ACCURACIES = ('acc_norm', 'acc')
_BITS = 'bits_per_byte'


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The results that `jaxsparse evaluate` left in a folder, by step and task.

  Files that are no results are passed over.
  """
  found = []
  for path in folder.glob('*.json') if folder.is_dir() else ():
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      result = json.loads(path.read_bytes())
      key = int(result['settings']['step']), str(result['task'])
      if _points(result['metrics'], (*_ACCURACIES, _BITS)):
        found.append((key, result))
  return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def draw(
  results: Mapping[str, Sequence[Mapping]], path: str | os.PathLike
) -> None:
  """Draws a line for each task into a PNG, with the newest step in front.

  Bars are of one standard error, and a grey stroke is chance.

  Args:
    results: of `read`, by the name of a model; of one model or of two.
    path: of the PNG.
  """
  tasks = list(
    dict.fromkeys(r['task'] for of_model in results.values() for r in of_model)
  )
  with plots.new_figure(path, height=1.6 + 0.4 * len(tasks)) as figure:
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, names, title in (
      (left, _ACCURACIES, 'Accuracy'),
      (right, (_BITS,), 'Bits per byte'),
    ):
      for number, (model, of_model) in enumerate(results.items()):
        # Of two models one is above the other.
        shift = 0.18 * (2 * number - len(results) + 1)
        _draw_model(axes, tasks, of_model, names, shift, number, model)
      axes.set_title(title)
    left.set_yticks(range(len(tasks)), tasks)
    left.set_ylim(len(tasks) - 0.5, -0.5)
    if len(results) > 1:
      right.legend(loc='best', fontsize=8)
    plots.explain(
      figure,
      'bars: one standard error; grey: chance; pale: earlier steps\n'
      'accuracy by characters where there are several choices',
    )


def _draw_model(axes, tasks, results, names, shift, number, model):
  newest = {r['task']: r['settings']['step'] for r in results}
  label = model
  for result in results:
    place = tasks.index(result['task']) + shift
    is_newest = result['settings']['step'] == newest[result['task']]
    for value, error, chance in _points(result['metrics'], names):
      axes.errorbar(
        value,
        place,
        xerr=error or 0.0,
        fmt='o',
        markersize=4,
        capsize=2,
        color=plots.colour(number),
        alpha=1.0 if is_newest else 0.3,
        label=label if is_newest else None,
      )
      label = label if not is_newest else None
      if chance:
        axes.plot(chance, place, '|', color='#999999', markersize=14)


def _points(metrics, names):
  """Value, error and chance of the first of the metrics that is there."""
  for name in names:
    if name in metrics:
      metric = metrics[name]
      return [(float(metric['value']), metric['stderr'], metric.get('chance'))]
  return []
