# SPDX-License-Identifier: Apache-2.0
"""Results as people read them: a line for each metric."""

from collections.abc import Sequence

from jaxsparse.evaluation.metrics import Metric
from jaxsparse.evaluation.run import Result

_HEAD = ('task', 'n', 'metric', 'value', '+-', 'chance')
_HEAD_OF_TWO = ('task', 'n', 'metric', 'value', 'other', 'difference', '+-')


def of_results(results: Sequence[Result]) -> str:
  """Values, standard errors and chance."""
  rows = [_HEAD]
  for result in results:
    for place, (name, metric) in enumerate(result.metrics.items()):
      chance = '' if metric.chance is None else f'{metric.chance:.4f}'
      rows.append((*_first(result, place), name, *_numbers(metric), chance))
  return _aligned(rows) + _notes(results, 'the model')


def of_differences(results: Sequence[Result], others: Sequence[Result]) -> str:
  """Values of two models, and their differences item by item."""
  rows = [_HEAD_OF_TWO]
  for result, other in zip(results, others, strict=True):
    for place, (name, metric) in enumerate(result.metrics.items()):
      against = other.metrics[name]
      difference = metric.minus(against)
      of_both = ('', '') if difference is None else _signed(difference)
      values = _numbers(metric)[0], _numbers(against)[0]
      rows.append((*_first(result, place), name, *values, *of_both))
  notes = _notes(results, 'the model') + _notes(others, 'the other model')
  return _aligned(rows) + notes


def _first(result: Result, place: int) -> tuple[str, str]:
  """Of a task's first line only."""
  return ('', '') if place else (result.task, f'{result.num_items:,}')


def _numbers(metric: Metric) -> tuple[str, str]:
  value = metric.value
  form = '.4f' if abs(value) < 1e5 else '.4g'
  error = '' if metric.error is None else f'{metric.error:{form}}'
  return f'{value:{form}}', error


def _signed(difference: Metric) -> tuple[str, str]:
  value, error = _numbers(difference)
  return value if value.startswith('-') else f'+{value}', error


def _notes(results: Sequence[Result], model: str) -> str:
  return ''.join(
    f'\n{result.task}: {result.num_cut:,} of {result.num_items:,} lost the '
    f'beginning of a context, which is longer than {model} reads (--max-len).'
    for result in results
    if result.num_cut
  )


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
  """Columns: names to the left, numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  is_left = [name in ('task', 'metric') for name in rows[0]]
  lines = (
    '  '.join(
      cell.ljust(width) if left else cell.rjust(width)
      for cell, width, left in zip(row, widths, is_left, strict=True)
    ).rstrip()
    for row in rows
  )
  return '\n'.join(lines)
