# SPDX-License-Identifier: Apache-2.0
"""Results of many runs as statistics over seeds, JSON and Markdown tables."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse.experiments.compare import continual_report
from jaxsparse.experiments.compare.spread import Spread as Spread
from jaxsparse.experiments.compare.spread import markdown, text_of
from jaxsparse.experiments.compare.suite import DENSE, Suite
from jaxsparse.run import workdir as workdir_lib

Result = dict[str, Any]

JSON_NAME, TABLE_NAME = 'comparison.json', 'comparison.md'


def spread(
  results: Sequence[Result], architecture: str, key: str, people: int = 0
) -> Spread | None:
  """A figure of an architecture over the seeds that are there."""
  values = tuple(
    float(r[key])
    for r in sorted(results, key=lambda r: r['seed'])
    if (r['architecture'], r['people']) == (architecture, people)
  )
  return Spread(values) if values else None


def most(
  results: Sequence[Result], architecture: str, key: str
) -> Spread | None:
  """For each seed the greatest of a figure over numbers of people."""
  mine = [r for r in results if r['architecture'] == architecture]
  seeds = sorted({r['seed'] for r in mine})
  values = tuple(
    max(float(r[key]) for r in mine if r['seed'] == seed) for seed in seeds
  )
  return Spread(values) if values else None


def write(suite: Suite, results: Sequence[Result], folder: pathlib.Path) -> str:
  """Writes `comparison.json` and `comparison.md`; returns the latter."""
  text = tables(suite, results)
  content = dict(
    total_parameters=suite.total_parameters,
    architectures=list(suite.architectures),
    **(dict(methods=list(suite.continual.methods)) if suite.continual else {}),
    runs=list(results),
  )
  for name, part in (
    (JSON_NAME, json.dumps(content, indent=1)),
    (TABLE_NAME, text),
  ):
    workdir_lib.write_whole(folder / name, (part + '\n').encode())
  return text


def tables(suite: Suite, results: Sequence[Result]) -> str:
  """The tables of the suite's architectures that have results."""
  if suite.continual is not None:
    return continual_report.tables(suite, results)
  done = {r['architecture'] for r in results}
  names = [name for name in suite.architectures if name in done]
  if suite.people:
    parts = [_sizes_table(names, results), _recall_table(suite, names, results)]
    parts.append(_capacity_table(names, results))
    return '\n\n'.join(parts)
  if suite.is_walk:
    return _walk_table(suite, names, results)
  if suite.needles:
    return '\n\n'.join(
      (_needles_table(names, results), _language_table(names, results))
    )
  return _language_table(names, results)


def _first(results: Sequence[Result], architecture: str) -> Result:
  return next(r for r in results if r['architecture'] == architecture)


def _size_cells(result: Result) -> list[str]:
  return [
    result['sizes'],
    f'{result["parameters"] / 1e6:.3g}M',
    f'{result["flops_per_token"] / 1e6:.3g}M',
  ]


_SIZE_HEADS = ['sizes', 'parameters', 'FLOPs/token']


def _sizes_table(names: Sequence[str], results: Sequence[Result]) -> str:
  rows = []
  for name in names:
    speeds = [
      r['tokens_per_second'] for r in results if r['architecture'] == name
    ]
    size = _size_cells(_first(results, name))
    rows.append([name, *size, f'{np.median(speeds):,.0f}'])
  return markdown(['architecture', *_SIZE_HEADS, 'tokens/s'], rows)


def _recall_table(
  suite: Suite, names: Sequence[str], results: Sequence[Result]
) -> str:
  numbers = sorted({r['people'] for r in results})
  heads = ['facts recalled']
  for number in numbers:
    one = next(r for r in results if r['people'] == number)
    heads.append(f'of {one["num_facts"]:,} ({one["exposures"]:.0f}x seen)')
  rows = []
  for name in names:
    cells = [spread(results, name, 'recall', number) for number in numbers]
    rows.append([name, *(text_of(cell, '.1%') for cell in cells)])
  return markdown(heads, rows)


def _capacity_table(names: Sequence[str], results: Sequence[Result]) -> str:
  """The most facts that an architecture has, and those of the longest text.

  An architecture may have fewer of more: without `exposures` all runs take the
  same steps and see a fact of a longer text less often, and with them the text
  may still be more than the model holds.
  """
  largest = max(r['people'] for r in results)
  num_facts = next(r['num_facts'] for r in results if r['people'] == largest)
  rows = []
  for name in names:
    held = [
      [
        most(results, one, 'facts_recalled'),
        spread(results, one, 'facts_recalled', largest),
      ]
      for one in (name, DENSE)
    ]
    cells = [
      cell
      for own, dense in zip(*held, strict=True)
      for cell in (text_of(own, ',.0f'), _ratio(own, dense))
    ]
    bits = text_of(most(results, name, 'bits'), ',.0f')
    per_parameter = text_of(most(results, name, 'bits_per_parameter'), '.3f')
    rows.append([name, *cells, bits, per_parameter])
  heads = ['architecture', 'most facts', 'to dense']
  heads += [f'of {num_facts:,}', 'to dense', 'most bits', 'bits/parameter']
  return markdown(heads, rows)


def _ratio(figure: Spread | None, base: Spread | None) -> str:
  if not (figure and base and base.mean):
    return '-'
  return f'{figure.mean / base.mean:.2f}x'


def _language_table(names: Sequence[str], results: Sequence[Result]) -> str:
  base = names[0]
  rows = [
    [
      name,
      *_size_cells(_first(results, name)),
      text_of(spread(results, name, 'validation_loss'), '.4f'),
      _change(results, None if name == base else base, name, 'validation_loss'),
      text_of(spread(results, name, 'bits_per_byte'), '.4f'),
      text_of(spread(results, name, 'training_loss'), '.4f'),
      _speed(results, name),
    ]
    for name in names
  ]
  # Seeds differ in their text, too: by pairs architectures differ by more.
  heads = ['validation nats/token', f'against {base}, seed by seed']
  heads += ['bits/byte', 'training nats', 'tokens/s']
  return markdown(['architecture', *_SIZE_HEADS, *heads], rows)


def _needles_table(names: Sequence[str], results: Sequence[Result]) -> str:
  base = names[0]
  rows = [
    [
      name,
      text_of(spread(results, name, 'needles_found'), '.1%'),
      _ratio(
        spread(results, name, 'needles_found'),
        spread(results, base, 'needles_found'),
      ),
    ]
    for name in names
  ]
  return markdown(['architecture', 'needles found', f'to {base}'], rows)


def _walk_table(
  suite: Suite, names: Sequence[str], results: Sequence[Result]
) -> str:
  """Losses, and what each step changed beside what was published."""
  rows = []
  before = None
  for name in names:
    published = suite.architectures[name].published
    rows.append(
      [
        name,
        *_size_cells(_first(results, name)),
        text_of(spread(results, name, 'validation_loss'), '.4f'),
        _change(results, before, name, 'training_loss'),
        _change(results, before, name, 'validation_loss'),
        '-' if published is None else f'{published[0]:+.3f}',
        '-' if published is None else f'{published[1]:+.3f}',
        _speed(results, name),
      ]
    )
    before = name
  heads = ['validation nats/token', 'change of training', 'of validation']
  heads += ['published: training', 'validation', 'tokens/s']
  return markdown(['step', *_SIZE_HEADS, *heads], rows)


def _change(
  results: Sequence[Result], before: str | None, name: str, key: str
) -> str:
  """Of a figure from one architecture to another, on the seeds of both."""
  if before is None:
    return '-'
  old, new = (
    {r['seed']: r[key] for r in results if r['architecture'] == one}
    for one in (before, name)
  )
  changes = tuple(new[seed] - old[seed] for seed in sorted(old.keys() & new))
  return text_of(Spread(changes) if changes else None, '+.4f')


def _speed(results: Sequence[Result], name: str) -> str:
  return text_of(spread(results, name, 'tokens_per_second'), ',.0f')
