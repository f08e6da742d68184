# SPDX-License-Identifier: Apache-2.0
"""New facts against old ones, of each method at each of its rates: a table."""

import dataclasses
from collections.abc import Sequence

from jaxsparse.experiments.compare.results import Result
from jaxsparse.experiments.compare.spread import Spread, markdown, text_of
from jaxsparse.experiments.compare.suite import Suite

# Shares of the new facts at which methods are compared.
LEVELS = (0.5, 0.8, 0.95)


@dataclasses.dataclass(frozen=True)
class Point:
  """A method at one of its rates, over the seeds that are there."""

  rate: float
  # Shares of the facts, after training.
  new: Spread
  old: Spread
  # Share of the old facts that the base had and the method has no more.
  forgotten: Spread


def points(results: Sequence[Result], method: str) -> list[Point]:
  """Of each rate of a method, ascending."""
  mine = sorted(
    (r for r in results if r['architecture'] == method and 'rate' in r),
    key=lambda r: r['seed'],
  )
  found = []
  for rate in sorted({r['rate'] for r in mine}):
    of_rate = [r for r in mine if r['rate'] == rate]
    found.append(
      Point(
        rate,
        Spread(tuple(r['recall'] for r in of_rate)),
        Spread(tuple(r['old_recall'] for r in of_rate)),
        Spread(tuple(map(forgotten, of_rate))),
      )
    )
  return found


def forgotten(result: Result) -> float:
  """Share of the old facts that the base had, less what is left of them."""
  before = result['old_recall_before']
  return 1 - result['old_recall'] / before if before else 0.0


def best(found: Sequence[Point]) -> Point:
  """That which has the most new facts on the mean."""
  return max(found, key=lambda point: point.new.mean)


def least_forgotten(found: Sequence[Point], level: float) -> Point | None:
  """That which forgets least of those that have so many new facts."""
  able = [point for point in found if point.new.mean >= level]
  return min(able, key=lambda point: point.forgotten.mean, default=None)


def tables(suite: Suite, results: Sequence[Result]) -> str:
  """A row for each method that has results."""
  assert suite.continual is not None
  names = [name for name in suite.continual.methods if points(results, name)]
  rows, levels = [], []
  for name in names:
    found = points(results, name)
    top = best(found)
    one = next(r for r in results if r['architecture'] == name)
    rows.append(
      [
        name,
        f'{one["num_trained"]:,}',
        f'{top.rate:g}',
        text_of(top.new, '.1%'),
        text_of(top.old, '.1%'),
        text_of(top.forgotten, '.1%'),
      ]
    )
    levels.append([name, *(_at(found, level) for level in LEVELS)])
  heads = ['method', 'parameters trained', 'rate of most new facts']
  heads += ['new facts', 'old facts', 'old ones forgotten']
  by_level = [f'forgotten with {level:.0%} of the new' for level in LEVELS]
  return '\n\n'.join(
    (
      _before(results),
      markdown(heads, rows),
      markdown(['method', *by_level], levels),
    )
  )


def _at(found: Sequence[Point], level: float) -> str:
  point = least_forgotten(found, level)
  if point is None:
    return '-'
  return f'{text_of(point.forgotten, ".1%")} at {point.rate:g}'


def _before(results: Sequence[Result]) -> str:
  mine = [r for r in results if 'rate' in r]
  if not mine:
    return 'No method has ended yet.'
  new, old = (
    Spread(tuple({r['seed']: r[key] for r in mine}.values()))
    for key in ('recall_before', 'old_recall_before')
  )
  return (
    f'The base has {text_of(old, ".1%")} of the facts of '
    f'{mine[0]["old_people"]:,} people, and {text_of(new, ".1%")} of those of '
    f'{mine[0]["people"]:,} new ones.'
  )
