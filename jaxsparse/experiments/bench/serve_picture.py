# SPDX-License-Identifier: Apache-2.0
"""A picture of a server under load."""

import os
from collections.abc import Sequence
from typing import Any

from jaxsparse.analysis.plots import COLOURS, new_figure


def plot_load(
  records: Sequence[dict[str, Any]], path: str | os.PathLike
) -> None:
  """Draws what open loops found into a PNG.

  Time to the first text, between pieces and in all against questions asked a
  second, on a logarithmic axis; below it what the server did and refused.

  Args:
    records: of `bench serve`.
    path: of the PNG.
  """
  rows = sorted(
    (r for r in records if r['loop'] == 'open' and r['whole']),
    key=lambda r: r['rate'],
  )
  rates = [r['rate'] for r in rows]
  with new_figure(path, height=6.0) as figure:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.set_title('Latency against load')
    for colour, (name, label) in zip(
      COLOURS,
      dict(
        first='first text', gap='between pieces', total='whole answer'
      ).items(),
      strict=False,
    ):
      for percent, style in ((50, '-'), (95, '--')):
        above.plot(
          rates,
          [(r[f'{name}_p{percent}'] or float('nan')) * 1e3 for r in rows],
          style,
          color=colour,
          marker='o',
          markersize=3,
          label=f'{label}, p{percent}',
        )
    above.set_yscale('log')
    above.set_ylabel('milliseconds')
    below.plot(
      rates,
      [r['requests_per_second'] for r in rows],
      color=COLOURS[2],
      marker='o',
      markersize=3,
      label='answered a second',
    )
    below.plot(
      rates,
      [r['rate'] * r['refused'] / r['requests'] for r in rows],
      color=COLOURS[1],
      marker='o',
      markersize=3,
      label='refused a second',
    )
    below.set_ylabel('requests')
    below.set_xlabel('questions asked a second')
    refusing = [r['rate'] for r in rows if r['refused']]
    # Where there are no curves: answers take long, or few are refused.
    above.legend(loc='center right', fontsize=8)
    below.legend(loc='upper left', fontsize=8)
    for axes in (above, below) if refusing else ():
      axes.axvline(refusing[0], color='#888888', linestyle=':')
    if refusing:
      above.annotate(
        'refusals (429) begin',
        (refusing[0], 0),
        xycoords=('data', 'axes fraction'),
        xytext=(4, 6),
        textcoords='offset points',
        color='#555555',
      )
