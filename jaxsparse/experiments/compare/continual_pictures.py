# SPDX-License-Identifier: Apache-2.0
"""A picture of what methods learn and forget: a line each, over its rates."""

import pathlib
from collections.abc import Sequence

import numpy as np

from jaxsparse.analysis import plots
from jaxsparse.experiments.compare import continual_report
from jaxsparse.experiments.compare.results import Result
from jaxsparse.experiments.compare.suite import Suite

_MARKERS = 'osD^vPX*'


def draw(
  suite: Suite, results: Sequence[Result], path: pathlib.Path
) -> pathlib.Path:
  """New facts to the right, old ones upwards; the corner of both is best."""
  assert suite.continual is not None
  with plots.new_figure(path, height=5.0) as figure:
    axes = figure.add_subplot()
    for i, name in enumerate(suite.continual.methods):
      found = continual_report.points(results, name)
      if not found:
        continue
      style = dict(color=plots.colour(i), marker=_MARKERS[i % len(_MARKERS)])
      axes.plot(
        [point.new.mean for point in found],
        [point.old.mean for point in found],
        label=name,
        markersize=6,
        **style,
      )
      for point in found:
        axes.scatter(
          point.new.values, point.old.values, s=8, alpha=0.4, **style
        )
    mine = [r for r in results if 'rate' in r]
    if mine:
      before = [
        np.mean([r[key] for r in mine])
        for key in ('recall_before', 'old_recall_before')
      ]
      axes.plot(*before, '+', color='black', markersize=14, label='base')
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter('{x:.0%}')
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel('new facts recalled')
    axes.set_ylabel('old facts recalled')
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
    plots.set_heading(
      figure,
      'New facts learned, and old ones kept',
      'a line for each method, a point for each rate: mean of the seeds; '
      'small: seeds',
    )
  return path
