# SPDX-License-Identifier: Apache-2.0
"""Pictures of a comparison: losses, seeds as dots with their range, recall.

Architectures are rows or panels with a name, never colours of a legend, of
which a reader can't distinguish seven. Losses are shown as differences to the
first architecture, seed by seed: seeds differ in their text, and by more than
architectures do.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.analysis import plots
from jaxsparse.experiments.compare import continual_pictures, report
from jaxsparse.experiments.compare.suite import Suite

Result = dict[str, Any]

_BASE_COLOUR, _COLOUR = '#777777', plots.COLOURS[0]
_PANELS_IN_A_ROW = 4
_SEEDS = 'dots: seeds; line: their range; stroke and number at the right: mean'


def draw(
  suite: Suite, results: Sequence[Result], folder: pathlib.Path
) -> list[pathlib.Path]:
  """Draws what the suite shows into PNGs of the folder; returns them."""
  if suite.continual is not None:
    picture = folder / 'continual.png'
    return [continual_pictures.draw(suite, results, picture)]
  done = {r['architecture'] for r in results}
  names = [name for name in suite.architectures if name in done]
  drawn = [folder / 'loss.png', folder / 'seeds.png']
  draw_losses(names, results, drawn[0])
  if suite.people:
    spreads = {n: report.most(results, n, 'facts_recalled') for n in names}
    is_most = len({r['people'] for r in results}) > 1
    title = 'Facts recalled' + is_most * ', the most of any text'
    draw_seeds(spreads, title, ',.0f', drawn[1])
    drawn.append(folder / 'recall.png')
    draw_recall(names, results, drawn[2])
  elif suite.needles:
    spreads = {n: report.spread(results, n, 'needles_found') for n in names}
    draw_seeds(spreads, 'Needles found', '.1%', drawn[1])
    drawn.append(folder / 'depth.png')
    draw_depths(names, results, drawn[2])
  else:
    draw_validation(names, results, drawn[1])
  return drawn


def draw_losses(
  names: Sequence[str], results: Sequence[Result], path: pathlib.Path
) -> None:
  """Training loss over steps: of the first, and what the others differ by.

  Lines are means of seeds that both have, bands go over all of them. With
  several numbers of people, of the largest.
  """
  people = max(r['people'] for r in results)
  curves = {
    name: {
      r['seed']: dict(r['curve'])
      for r in results
      if (r['architecture'], r['people']) == (name, people)
    }
    for name in names
  }
  curves = {name: seeds for name, seeds in curves.items() if seeds}
  (base, of_base), *others = curves.items()
  rows = -(-len(curves) // _PANELS_IN_A_ROW)
  columns = -(-len(curves) // rows)
  with plots.new_figure(path, height=0.6 + 2.1 * rows) as figure:
    first, *rest = figure.subplots(rows, columns, squeeze=False).flat
    steps, values = _stacked(list(of_base.values()))
    _band(first, steps, values, _BASE_COLOUR)
    plots.limit_loss(first, list(values.flat))
    first.set_title(base)
    first.set_ylabel('nats per token')
    late = [0.0]
    for axes, (name, of_name) in zip(rest, others, strict=False):
      pairs = [
        _less(of_name[seed], of_base[seed])
        for seed in sorted(of_name.keys() & of_base)
      ]
      axes.set_title(name)
      axes.axhline(0, color=_BASE_COLOUR, linewidth=1)
      if pairs:
        steps, values = _stacked(pairs)
        _band(axes, steps, values, _COLOUR)
        late += values[:, len(steps) // 5 :].flat
    margin = 0.1 * (max(late) - min(late)) or 0.1
    for axes in rest[: len(others)]:
      axes.set_ylim(min(late) - margin, max(late) + margin)
    for axes in rest[len(others) :]:
      axes.remove()
    for axes in figure.axes:
      axes.set_xlabel('step')
    text = f' with {people:,} people' if people else ''
    plots.set_heading(
      figure,
      f'Training loss of {base}{text}, and how others differ from it',
      'below 0: better; line: mean of the seeds, band: all of them',
    )


def _less(curve: Mapping[float, float], other: Mapping[float, float]) -> dict:
  """The difference at steps of both: a resumed run may have fewer."""
  return {s: curve[s] - other[s] for s in sorted(curve.keys() & other)}


def _stacked(
  curves: Sequence[Mapping[float, float]],
) -> tuple[np.ndarray, np.ndarray]:
  """Steps that all have [points], and smooth values there [curves, points]."""
  steps = sorted(set.intersection(*(set(curve) for curve in curves)))
  values = np.array([[curve[step] for step in steps] for curve in curves])
  width = max(1, len(steps) // 20)
  return np.array(steps), np.stack([plots.smooth(v, width) for v in values])


def draw_validation(
  names: Sequence[str], results: Sequence[Result], path: pathlib.Path
) -> None:
  """Validation losses as differences to the first, seed by seed.

  Where an architecture shares no seed with the first, the losses themselves.
  """
  losses = {
    name: {
      r['seed']: r['validation_loss']
      for r in results
      if r['architecture'] == name
    }
    for name in names
  }
  base = names[0]
  shared = {
    name: [
      of_name[seed] - losses[base][seed]
      for seed in sorted(of_name.keys() & losses[base])
    ]
    for name, of_name in losses.items()
  }
  if len(names) == 1 or not all(shared.values()):
    spreads = {n: report.spread(results, n, 'validation_loss') for n in names}
    title = 'Validation loss, nats per token; lower is better'
    draw_seeds(spreads, title, '.3f', path, from_zero=False)
    return
  means = {n: np.mean(list(seeds.values())) for n, seeds in losses.items()}
  draw_seeds(
    {base: None}
    | {n: report.Spread(tuple(c)) for n, c in shared.items() if n != base},
    f'Validation loss against {base}, nats per token; lower is better',
    '+.3f',
    path,
    labels={n: f'{n}  {mean:.3f}' for n, mean in means.items()},
    explanation=f'{_SEEDS}; at the left: mean loss',
  )


def draw_seeds(
  spreads: Mapping[str, report.Spread | None],
  title: str,
  form: str,
  path: pathlib.Path,
  labels: Mapping[str, str] | None = None,
  from_zero: bool = True,
  explanation: str = _SEEDS,
) -> None:
  """A row for each architecture: its seeds, their range and their mean.

  Args:
    spreads: of each architecture; None where nothing is to be drawn.
    title: of the picture.
    form: in which means are written at the end of a row.
    path: of the PNG.
    labels: of the rows, if not the architectures' names.
    from_zero: whether 0 is in the picture, as amounts want it.
    explanation: of the signs.
  """
  with plots.new_figure(path, height=1.4 + 0.36 * len(spreads)) as figure:
    axes = figure.add_subplot()
    _rows(axes, spreads, form, labels or {})
    if from_zero:
      axes.axvline(0, color='#888888', linewidth=1)
    _format_axis(axes, form)
    plots.set_heading(figure, title, explanation)


def _rows(axes, spreads, form, labels):
  for row, spread in enumerate(spreads.values()):
    if spread is None:
      continue
    style = dict(color=_BASE_COLOUR if row == 0 else _COLOUR)
    ends = (spread.low, spread.high)
    axes.plot(ends, (row, row), alpha=0.35, linewidth=3, **style)
    axes.plot(
      spread.mean, row, '|', markersize=15, markeredgewidth=2.5, **style
    )
    seeds = [row] * len(spread.values)
    axes.plot(spread.values, seeds, 'o', markersize=4, **style)
    axes.annotate(
      format(spread.mean, form).replace('-', '\N{MINUS SIGN}'),
      (1, row),
      xycoords=('axes fraction', 'data'),
      xytext=(10, 0),
      textcoords='offset points',
      va='center',
      color='#333333',
    )
  names = [labels.get(name, name) for name in spreads]
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.grid(visible=False, axis='y')


def _format_axis(axes, form):
  if form.endswith('%'):
    axes.xaxis.set_major_formatter('{x:.0%}')
    axes.set_xlim(-0.03, 1.03)
  elif ',' in form:
    axes.xaxis.set_major_formatter('{x:,.0f}')


def draw_recall(
  names: Sequence[str], results: Sequence[Result], path: pathlib.Path
) -> None:
  """A panel for each number of facts: share recalled; and bits stored."""
  numbers = sorted({r['people'] for r in results})
  num_facts = {r['people']: r['num_facts'] for r in results}
  panels = [
    (
      f'of {num_facts[number]:,} facts',
      '.0%',
      {n: report.spread(results, n, 'recall', number) for n in names},
    )
    for number in numbers
  ]
  most = {n: report.most(results, n, 'bits_per_parameter') for n in names}
  panels.append(('most bits per parameter', '.2f', most))
  columns = min(len(panels), 3)
  rows = -(-len(panels) // columns)
  height = 0.6 + rows * (0.8 + 0.3 * len(names))
  with plots.new_figure(path, height=height) as figure:
    axes_of = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes, (title, form, spreads) in zip(axes_of, panels, strict=False):
      _rows(axes, spreads, form, {})
      axes.set_title(title, fontsize=10)
      _format_axis(axes, form)
      if not form.endswith('%'):
        axes.set_xlim(left=0)
    for axes in list(axes_of)[len(panels) :]:
      axes.remove()
    plots.set_heading(figure, 'Facts recalled', _SEEDS)


def draw_depths(
  names: Sequence[str], results: Sequence[Result], path: pathlib.Path
) -> None:
  """Needles found, by the part of the haystack that holds them."""
  with plots.new_figure(path, height=4.0) as figure:
    axes = figure.add_subplot()
    ends = {}
    for i, name in enumerate(names):
      shares = np.array(
        [
          r['needles_found_by_depth']
          for r in results
          if r['architecture'] == name
        ]
      )
      parts = (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
      colour = plots.colour(i)
      _band(axes, parts, shares, colour, marker='o')
      ends[name] = shares[:, -1].mean(), colour
    axes.set_xlabel('place in the haystack, from its beginning')
    axes.xaxis.set_major_formatter('{x:.0%}')
    axes.yaxis.set_major_formatter('{x:.0%}')
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.05)
    plots.label_ends(axes, ends)
    plots.set_heading(
      figure, 'Needles found', 'line: mean of the seeds, band: all of them'
    )


def _band(
  axes: Any, x: np.ndarray, values: np.ndarray, colour: str, marker: str = ''
) -> None:
  """A line through the mean of values [seeds, points], between the extremes."""
  axes.plot(x, values.mean(0), color=colour, marker=marker, markersize=4)
  axes.fill_between(
    x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0
  )
