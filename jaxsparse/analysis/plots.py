# SPDX-License-Identifier: Apache-2.0
"""Training curves of a run, and what all pictures share.

They read what training wrote (rows of `metrics.jsonl`) and draw what they find;
keys that are missing leave their curve out. Matplotlib is imported on first use
and never needs a display.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxsparse.run import workdir

Row = Mapping[str, Any]

# What the validation loss of pictures with texts is, by what is there besides.
_LOSSES_OF_PAIRS = dict(
  caption_loss='nats per token of captions',
  captions_recall_at_1='1 - mean R@1',
  chosen='share wrong',
)

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = (
  '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000'
)  # fmt: skip

STYLE = {
  'axes.axisbelow': True,
  'axes.edgecolor': '#888888',
  'axes.grid': True,
  'axes.labelcolor': '#333333',
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlelocation': 'left',
  'axes.titlesize': 11,
  'axes.titleweight': 'bold',
  'figure.constrained_layout.use': True,
  'figure.dpi': 150,
  'font.size': 10,
  'grid.color': '#e6e6e6',
  'legend.frameon': False,
  'lines.linewidth': 1.6,
  'xtick.color': '#555555',
  'ytick.color': '#555555',
}


def plot_training(
  rows: Sequence[Row],
  path: str | os.PathLike,
  baselines: Mapping[str, float] | None = None,
) -> None:
  """Draws loss, learning rates and speed over steps into a PNG.

  The loss is in bits per byte where the rows have it, else in nats per token.

  Args:
    rows: of `metrics.jsonl`, in order of their `step`.
    path: of the PNG.
    baselines: bits per byte of other codes for the validation text, such as
      {'gzip': 2.6, 'xz': 2.1}, drawn as level lines.
  """
  with new_figure(path, height=6.0) as figure:
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    _plot_loss(figure.add_subplot(grid[0, :]), rows, baselines or {})
    _plot_rates(figure.add_subplot(grid[1, 0]), rows)
    _plot_speed(figure.add_subplot(grid[1, 1]), rows)


@contextlib.contextmanager
def new_figure(path: str | os.PathLike, height: float) -> Iterator[Any]:
  """A styled figure that is written to `path` at the end of the block."""
  import matplotlib  # Slow to import, and only needed when a run ends.
  from matplotlib.figure import Figure

  with matplotlib.rc_context(STYLE):
    # Not through pyplot: its figures are global and pick a backend.
    figure = Figure(figsize=(8, height))
    yield figure
    for axes in figure.axes:
      _mark_empty(axes)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    figure.savefig(png, format='png')
    workdir.write_whole(path, png.getvalue())


def _series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of the rows that have a finite number under `key`."""
  points = [
    (row['step'], row[key])
    for row in rows
    if isinstance(row.get(key), int | float) and np.isfinite(row[key])
  ]
  steps, values = zip(*points, strict=True) if points else ((), ())
  return np.array(steps), np.array(values, np.float64)


def curves(rows: Sequence[Row], suffix: str) -> dict[str, tuple]:
  """Series of each layer with a metric that ends in `suffix`."""
  keys = sorted({key for row in rows for key in row if key.endswith(suffix)})
  return {key.split('/')[0]: _series(rows, key) for key in keys}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Mean over the last `window` values, or over as many as there are."""
  total = np.cumsum(np.concatenate([[0.0], values]))
  end = np.arange(1, len(values) + 1)
  start = np.maximum(end - window, 0)
  return (total[end] - total[start]) / (end - start)


def _plot_loss(axes: Any, rows: Sequence[Row], baselines: Mapping) -> None:
  in_bits = any('bits_per_byte' in key for row in rows for key in row)
  key = 'bits_per_byte' if in_bits else 'loss'
  steps, values = _series(rows, key)
  if len(values):
    axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=1)
    line = smooth(values, max(1, len(values) // 30))
    _draw(axes, steps, line, color=COLOURS[0], label='train')
  steps, validation = _series(rows, f'validation_{key}')
  of_pairs = _loss_of_pairs(rows)
  if len(validation):
    label = f'validation{of_pairs} ({validation[-1]:.3f} at the end)'
    axes.plot(steps, validation, 'o-', color=COLOURS[1], label=label)
  steps, old = _series(rows, f'old_validation_{key}')
  if len(old):
    label = f'old text ({old[0]:.3f} -> {old[-1]:.3f})'
    axes.plot(steps, old, 's-', color=COLOURS[2], label=label)
  level = {name: bits for name, bits in baselines.items() if in_bits}
  for i, (name, bits) in enumerate(level.items()):
    colour = '#666666'
    style = ('--', ':', '-.')[i % 3]
    label = f'{name} ({bits:.3f})'
    axes.axhline(bits, color=colour, linestyle=style, label=label)
  limit_loss(axes, [*values, *validation, *old, *level.values()])
  axes.set_title('Loss')
  axes.set_xlabel('step')
  of_text = 'bits per byte' if in_bits else 'nats per token'
  axes.set_ylabel('loss' if of_pairs else of_text)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(loc='upper right')


def _loss_of_pairs(rows: Sequence[Row]) -> str:
  """What the validation loss of pictures with texts is; empty for text.

  It is another one than is trained, see `PairValidation.loss`.
  """
  keys = {key for row in rows for key in row}
  for key, what in _LOSSES_OF_PAIRS.items():
    if f'validation_{key}' in keys:
      return f': {what}'
  return ''


def set_heading(figure: Any, title: str, explanation: str) -> None:
  """A title over all panels, and a smaller line that says how to read them."""
  figure.suptitle(title, x=0.01, ha='left', fontsize=11, fontweight='bold')
  explain(figure, explanation)


def explain(figure: Any, text: str) -> None:
  """A line under all panels that says how to read them."""
  figure.supxlabel(text, x=0.01, ha='left', fontsize=9, color='#555555')


def colour(index: int) -> str:
  """A colour for each of a few; grey beyond, where only names distinguish
  them."""
  return COLOURS[index] if index < len(COLOURS) else '#777777'


def label_ends(axes: Any, ends: Mapping[str, tuple[float, str]]) -> None:
  """Writes names at the right, beside the ends of their lines.

  Names whose lines end close together are moved apart.

  Args:
    axes: with their final limits.
    ends: of each name the line's last value and its colour.
  """
  low, high = axes.get_ylim()
  # Of a line of text at the usual size, in parts of the axis.
  least = 0.055
  order = sorted(ends, key=lambda name: ends[name][0])
  wanted = [(ends[name][0] - low) / (high - low) for name in order]
  for name, place in zip(order, spread_out(wanted, least), strict=True):
    axes.annotate(
      name,
      (1.01, place),
      xycoords='axes fraction',
      va='center',
      color=ends[name][1],
    )


def spread_out(places: Sequence[float], least: float) -> np.ndarray:
  """The rising `places` moved no further than needed to be `least` apart.

  Those that touch stand around their common mean.
  """
  groups: list[list[float]] = []
  for place in places:
    groups.append([place])
    while len(groups) > 1 and (
      _middle(groups[-1]) - _middle(groups[-2])
      < least * (len(groups[-1]) + len(groups[-2])) / 2
    ):
      groups[-2:] = [groups[-2] + groups[-1]]
  return np.concatenate(
    [
      _middle(group) + least * (np.arange(len(group)) - (len(group) - 1) / 2)
      for group in groups
    ]
  )


def _middle(group: Sequence[float]) -> float:
  return float(np.mean(group))


def _draw(axes: Any, steps: np.ndarray, values: np.ndarray, **style) -> None:
  """A line, or a dot where there is a single point to draw."""
  axes.plot(steps, values, marker='o' if len(steps) == 1 else '', **style)


def _mark_empty(axes: Any) -> None:
  """Says so where nothing was drawn, instead of ticks that mean nothing."""
  if not axes.has_data():
    axes.set(xticks=[], yticks=[])
    axes.text(
      0.5,
      0.5,
      'not recorded',
      color='#888888',
      ha='center',
      va='center',
      transform=axes.transAxes,
    )


def limit_loss(axes: Any, values: Sequence[float]) -> None:
  """Cuts off the first steps' fall, which would flatten all that follows."""
  if not values:
    return
  low, high = min(values), max(values)
  top = min(high, 1.3 * float(np.percentile(values, 90)))
  margin = 0.06 * (top - low) or 0.1
  axes.set_ylim(low - margin, top + margin)


def _plot_rates(axes: Any, rows: Sequence[Row]) -> None:
  for i, (key, label) in enumerate(
    [('learning_rate', 'model'), ('value_learning_rate', 'values')]
  ):
    steps, rates = _series(rows, key)
    if len(rates):
      _draw(axes, steps, rates, color=COLOURS[i], label=label)
      axes.set_yscale('log')
  axes.set_title('Learning rate')
  axes.set_xlabel('step')
  if axes.get_legend_handles_labels()[0]:
    axes.legend()


def _plot_speed(axes: Any, rows: Sequence[Row]) -> None:
  steps, speed = _series(rows, 'tokens_per_second')
  if len(speed):
    _draw(axes, steps, speed, color=COLOURS[2])
    # Compiling and saving make single steps slow; the top is what counts.
    axes.set_ylim(0, 1.15 * max(speed))
  axes.yaxis.set_major_formatter(_thousands)
  axes.set_title('Tokens per second')
  axes.set_xlabel('step')


def _thousands(value: float, _: int) -> str:
  return f'{value:,.0f}'


def layer_colours(layers: Sequence[str]) -> dict[str, Any]:
  """Colours of layers; of many, shades from the first to the last."""
  import matplotlib

  if len(layers) <= len(COLOURS):
    return dict(zip(layers, COLOURS, strict=False))
  shades = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(layers)))
  return dict(zip(layers, shades, strict=True))


def legend_of_layers(
  axes: Any, labels: Mapping[str, str], colours: Mapping[str, Any], **style
) -> None:
  """A legend of all layers; of many, of the first, a middle and the last."""
  from matplotlib.lines import Line2D

  layers = list(labels)
  if len(layers) > len(COLOURS):
    layers = [layers[0], layers[len(layers) // 2], layers[-1]]
  lines = [
    Line2D([], [], color=colours[layer], label=labels[layer])
    for layer in layers
  ]
  axes.legend(handles=lines, fontsize=8, **style)


def plot_history(axes: Any, curves: Mapping, colours: Mapping) -> None:
  for layer, (steps, values) in curves.items():
    _draw(axes, steps, values, color=colours[layer])
  axes.set_xlabel('step')
