"""Pictures of a comparison: loss curves, bars with spread, recall."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse.analysis import plots
from jaxsparse.compare import report
from jaxsparse.compare.suite import Suite

Result = dict[str, Any]


def draw(
  suite: Suite, results: Sequence[Result], folder: pathlib.Path
) -> list[pathlib.Path]:
  """Draws what the suite shows into PNGs of the folder; returns them."""
  done = {r['architecture'] for r in results}
  names = [name for name in suite.architectures if name in done]
  drawn = [folder / 'loss.png', folder / 'bars.png']
  draw_losses(names, results, drawn[0])
  if suite.people:
    draw_bars(names, results, 'facts_recalled', 'Facts recalled', drawn[1])
    drawn.append(folder / 'recall.png')
    draw_recall(names, results, drawn[2])
  elif suite.needles:
    draw_bars(names, results, 'needles_found', 'Needles found', drawn[1])
    drawn.append(folder / 'depth.png')
    draw_depths(names, results, drawn[2])
  else:
    title = 'Validation loss (nats per token)'
    draw_bars(names, results, 'validation_loss', title, drawn[1])
  return drawn


def draw_losses(
  names: Sequence[str], results: Sequence[Result], path: pathlib.Path
) -> None:
  """Training loss over steps: mean of the seeds, and a band over them.

  With several numbers of people, of the largest.
  """
  people = max(r['people'] for r in results)
  with plots.new_figure(path, height=4.5) as figure:
    axes = figure.add_subplot()
    lowest = []
    for i, name in enumerate(names):
      curves = [
        np.array(r['curve'])
        for r in results
        if (r['architecture'], r['people']) == (name, people)
      ]
      if not curves:
        continue
      # A run that was resumed may have a row more or fewer.
      length = min(len(curve) for curve in curves)
      losses = np.stack([curve[:length, 1] for curve in curves])
      _band(axes, curves[0][:length, 0], losses, i, name)
      lowest += list(losses[:, length // 10 :].flat)
    if lowest:
      margin = 0.05 * (max(lowest) - min(lowest)) or 0.1
      axes.set_ylim(min(lowest) - margin, max(lowest) + margin)
    text = f' with {people:,} people' if people else ''
    axes.set_title(f'Training loss{text}; band: all seeds')
    axes.set_xlabel('step')
    axes.set_ylabel('nats per token')
    axes.legend(loc='upper right', ncols=2)


def draw_bars(
  names: Sequence[str],
  results: Sequence[Result],
  key: str,
  title: str,
  path: pathlib.Path,
) -> None:
  """A bar for each architecture, and each seed as a dot.

  Of facts the bars show the most over all numbers of people. Those of losses
  begin near the lowest, for only differences matter, all others at 0.
  """
  of_most = key == 'facts_recalled'
  from_zero = key != 'validation_loss'
  spreads = [
    report.most(results, name, key)
    if of_most
    else report.spread(results, name, key)
    for name in names
  ]
  with plots.new_figure(path, height=1.5 + 0.4 * len(names)) as figure:
    axes = figure.add_subplot()
    lows = [s.low for s in spreads if s]
    highs = [s.high for s in spreads if s]
    margin = 0.3 * (max(highs) - min(lows)) or 0.1 * max(highs) or 1.0
    start = 0.0 if from_zero else min(lows) - margin
    for i, (name, figures) in enumerate(zip(names, spreads, strict=True)):
      if figures is None:
        continue
      axes.barh(name, figures.mean - start, left=start, color=_colour(i))
      axes.plot(
        figures.values,
        [name] * len(figures.values),
        'ko',
        markersize=4,
        markeredgecolor='white',
      )
    axes.invert_yaxis()
    axes.set_xlim(start, max(highs) + 0.3 * margin)
    axes.set_title(f'{title}; dots: seeds')


def draw_recall(
  names: Sequence[str], results: Sequence[Result], path: pathlib.Path
) -> None:
  """Over the number of facts: share recalled, and bits per parameter."""
  panels = [
    ('recall', 'Facts recalled (band: all seeds)'),
    ('bits_per_parameter', 'Bits stored per parameter'),
  ]
  numbers = sorted({r['people'] for r in results})
  num_facts = {r['people']: r['num_facts'] for r in results}
  with plots.new_figure(path, height=4.0) as figure:
    for column, (key, title) in enumerate(panels):
      axes = figure.add_subplot(1, len(panels), column + 1)
      for i, name in enumerate(names):
        found = {n: report.spread(results, name, key, n) for n in numbers}
        points = [(num_facts[n], s) for n, s in found.items() if s]
        if not points:
          continue
        facts, spreads = zip(*points, strict=True)
        band = np.array([[s.low, s.mean, s.high] for s in spreads]).T
        _band(axes, np.array(facts), band, i, name, middle=band[1])
      axes.set_xscale('log')
      axes.set_xticks(list(num_facts.values()))
      axes.set_xticks([], minor=True)
      axes.xaxis.set_major_formatter('{x:,.0f}')
      axes.set_title(title)
      axes.set_xlabel('facts in the text')
      if key == 'recall':
        axes.yaxis.set_major_formatter('{x:.0%}')
        axes.set_ylim(bottom=0)
        axes.legend()


def draw_depths(
  names: Sequence[str], results: Sequence[Result], path: pathlib.Path
) -> None:
  """Needles found, by the part of the haystack that holds them."""
  with plots.new_figure(path, height=4.0) as figure:
    axes = figure.add_subplot()
    for i, name in enumerate(names):
      shares = np.array(
        [
          r['needles_found_by_depth']
          for r in results
          if r['architecture'] == name
        ]
      )
      parts = (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
      _band(axes, parts, shares, i, name)
    axes.set_title('Needles found; band: all seeds')
    axes.set_xlabel('place in the haystack, from its beginning')
    axes.xaxis.set_major_formatter('{x:.0%}')
    axes.yaxis.set_major_formatter('{x:.0%}')
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.05)
    axes.legend()


def _band(
  axes: Any,
  x: np.ndarray,
  values: np.ndarray,
  index: int,
  name: str,
  middle: np.ndarray | None = None,
) -> None:
  """A line through the mean of values [seeds, points], between the extremes."""
  middle = values.mean(axis=0) if middle is None else middle
  marker = 'o' if len(x) < 12 else ''
  axes.plot(
    x, middle, color=_colour(index), marker=marker, markersize=4, label=name
  )
  axes.fill_between(
    x,
    values.min(axis=0),
    values.max(axis=0),
    color=_colour(index),
    alpha=0.2,
    linewidth=0,
  )


def _colour(index: int) -> Any:
  """Okabe and Ito's while they last; a long walk needs more."""
  if index < len(plots.COLOURS):
    return plots.COLOURS[index]
  shade = 0.25 + 0.07 * (index - len(plots.COLOURS))
  return (min(shade, 0.85),) * 3
