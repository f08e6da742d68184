# SPDX-License-Identifier: Apache-2.0
"""The use of a memory layer's slots, as a picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsparse.analysis import plots, usage


def plot_slot_usage(
  counts: Mapping[str, np.ndarray],
  path: str | os.PathLike,
  rows: Sequence[plots.Row] = (),
  names: Mapping[str, str] | None = None,
) -> None:
  """Draws how often each slot was read, most used first, into a PNG.

  Args:
    counts: reads [M] of each memory layer over a pass, by its block.
    path: of the PNG.
    rows: of `metrics.jsonl`; where they have usage metrics, the share of slots
      used and the KL divergence from uniform use are drawn over training below.
    names: what to call the memory layer of a block, if not by the block.
  """
  used = plots.curves(rows, '/memory/usage_fraction')
  uneven = plots.curves(rows, '/memory/usage_kl')
  has_history = bool(used or uneven)
  layers = sorted({*counts, *used, *uneven})
  colours = plots.layer_colours(layers)
  names = {layer: (names or {}).get(layer, layer) for layer in layers}
  with plots.new_figure(path, height=6.8 if has_history else 4.3) as figure:
    grid = figure.add_gridspec(
      1 + has_history, 2, height_ratios=(2, 1)[: 1 + has_history]
    )
    _plot_reads(figure.add_subplot(grid[0, :]), counts, colours, names)
    if has_history:
      share = figure.add_subplot(grid[1, 0])
      share.set_title('Slots used in a step')
      plots.plot_history(share, used, colours)
      share.set_ylim(0, 1.02)
      share.yaxis.set_major_formatter('{x:.0%}')
      divergence = figure.add_subplot(grid[1, 1])
      divergence.set_title('KL from uniform in a step (nats)')
      plots.plot_history(divergence, uneven, colours)
      divergence.set_ylim(bottom=0)
    plots.explain(
      figure,
      'KL: log of the number of slots minus entropy of their reads (nats)\n'
      '0: all slots are read alike; u: as if only a share exp(-u) were, alike',
    )


def _plot_reads(
  axes: Any,
  counts: Mapping[str, np.ndarray],
  colours: Mapping[str, Any],
  names: Mapping[str, str],
) -> None:
  labels = {}
  for layer, reads in sorted(counts.items()):
    measured = usage.measure(reads)
    labels[layer] = (
      f'{names[layer]}: {measured.usage_fraction:.1%} used, '
      f'KL {measured.usage_kl:.2f}'
    )
    if reads.any():
      # Most used first; slots that were never read end the curve.
      ordered = np.sort(reads[reads > 0])[::-1]
      position = _log_spaced(len(ordered))
      axes.plot(position + 1, ordered[position], color=colours[layer])
  means = {reads.sum() / len(reads) for reads in counts.values() if reads.any()}
  for mean in means:
    axes.axhline(mean, color='#666666', linestyle=':', linewidth=1)
  axes.set_title('Reads of each slot in one pass (dotted: all slots equal)')
  axes.set_xlabel('slots, most read first')
  axes.set_ylabel('reads')
  if means:
    axes.set_xscale('log')
    axes.set_yscale('log')
    plots.legend_of_layers(axes, labels, colours, loc='lower left')


def _log_spaced(length: int, num_points: int = 2000) -> np.ndarray:
  """Indices below `length` that are dense enough on a logarithmic axis."""
  if length <= num_points:
    return np.arange(length)
  spaced = np.geomspace(1, length, num_points)
  return np.unique(spaced.astype(np.int64)) - 1
