# SPDX-License-Identifier: Apache-2.0
"""All pictures of a run, drawn from what it left in its workdir.

Beside `metrics.jsonl` that is one file of the last validation pass: how often
each slot and each expert was used, and what other codes make of the text.
"""

import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxsparse.analysis import plots, usage_pictures
from jaxsparse.config.model import block_name
from jaxsparse.run import workdir

VALIDATION_STATS = 'validation_pass.npz'

# What distinguishes the two kinds of arrays in the file.
_COUNTS, _BASELINES = 'counts/', 'baselines/'

# How `eval_step` names the loads of a block's experts.
_EXPERTS = ' experts'


def save_pass(
  folder: pathlib.Path,
  counts: Mapping[str, np.ndarray],
  baselines: Mapping[str, float],
) -> None:
  """Keeps the counts of a validation pass beside the metrics.

  Args:
    folder: of the run.
    counts: uses of each slot or expert, by layer.
    baselines: bits per byte of other codes for the validation text.

  Raises:
    OSError: the file can't be written.
  """
  arrays = {_COUNTS + name: reads for name, reads in counts.items()}
  arrays |= {_BASELINES + name: np.array(b) for name, b in baselines.items()}
  file = io.BytesIO()
  np.savez_compressed(file, **arrays)
  workdir.write_whole(folder / VALIDATION_STATS, file.getvalue())


def draw(
  folder: pathlib.Path,
  rows: Sequence[plots.Row],
  into: pathlib.Path,
  placements: Sequence[tuple[int, int]] = (),
  say: Callable[[str], None] = print,
) -> list[pathlib.Path]:
  """Draws every picture that the run has data for.

  Args:
    folder: of the run; without a finished validation pass there are fewer.
    rows: of `metrics.jsonl`.
    into: where the pictures go.
    placements: blocks at which memory layers read and write.
    say: gets a sentence if what the validation pass left is damaged.

  Returns:
    Their paths.

  Raises:
    UserError: the pictures can't be written.
  """
  with workdir.write_errors(folder):
    return _draw(
      _read_pass(folder / VALIDATION_STATS, say), rows, into, placements
    )


def _read_pass(
  path: pathlib.Path, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
  if not path.exists():
    return {}
  try:
    with np.load(path) as file:
      arrays = {name: file[name] for name in file.files}
    for name, array in arrays.items():
      is_right = array.size and array.ndim == int(name.startswith(_COUNTS))
      if not is_right or not np.isfinite(array).all():
        raise ValueError(name)
  except Exception:  # NumPy and zipfile have many for what is no such file.
    say(f'{str(path)!r} is damaged: the pictures are drawn without it.')
    return {}
  return arrays


def _draw(
  arrays: Mapping[str, np.ndarray],
  rows: Sequence[plots.Row],
  into: pathlib.Path,
  placements: Sequence[tuple[int, int]],
) -> list[pathlib.Path]:
  counts = _part(arrays, _COUNTS)
  slots = {n: c for n, c in counts.items() if not n.endswith(_EXPERTS)}
  experts = {
    n.removesuffix(_EXPERTS): c
    for n, c in counts.items()
    if n.endswith(_EXPERTS)
  }
  baselines = {n: float(b) for n, b in _part(arrays, _BASELINES).items()}
  workdir.make_folder(into)
  drawn = [into / 'training.png']
  plots.plot_training(rows, drawn[0], baselines)
  if slots or plots.curves(rows, '/memory/usage_fraction'):
    drawn.append(into / 'slot_usage.png')
    names = {
      block_name(read): _place(read, write) for read, write in placements
    }
    usage_pictures.plot_slot_usage(slots, drawn[-1], rows, names)
  if experts or plots.curves(rows, '/moe/usage_max'):
    drawn.append(into / 'expert_load.png')
    plot_expert_load(experts, drawn[-1], rows)
  if plots.curves(rows, '/attention/kept_share'):
    drawn.append(into / 'sparse_attention.png')
    plot_kept_blocks(drawn[-1], rows)
  return drawn


def _place(read: int, write: int) -> str:
  of = f'memory of block {read}'
  return of if read == write else f'{of}, added after block {write}'


def plot_expert_load(
  counts: Mapping[str, np.ndarray],
  path: str | os.PathLike,
  rows: Sequence[plots.Row] = (),
) -> None:
  """Draws the load of every expert, and its history, into a PNG.

  Args:
    counts: tokens [X] of each layer's experts over a pass, by its name.
    path: of the PNG.
    rows: of `metrics.jsonl`; where they have routing metrics, the largest load
      and the KL divergence from uniform loads are drawn over training below.
  """
  histories = {
    'Largest load in a step (mean: 1)': plots.curves(rows, '/moe/usage_max'),
    'KL from uniform in a step (nats)': plots.curves(rows, '/moe/usage_kl'),
  }
  has_loads = bool(counts)
  height = 3.0 + has_loads * (1.5 + 0.25 * len(counts))
  with plots.new_figure(path, height=height) as figure:
    grid = figure.add_gridspec(1 + has_loads, 2)
    if has_loads:
      _draw_loads(figure, figure.add_subplot(grid[0, :]), counts)
    most, uneven = _draw_histories(figure, grid[-1, :], histories, counts)
    most.set_ylim(bottom=1)
    uneven.set_ylim(bottom=0)
    plots.explain(
      figure,
      'KL: log of the number of experts minus entropy of their load; '
      '0: all loads are equal',
    )


def plot_kept_blocks(
  path: str | os.PathLike, rows: Sequence[plots.Row]
) -> None:
  """Draws how sparse attention's choice changed over training, into a PNG."""
  histories = {
    'Kept blocks, of the eligible': '/attention/kept_share',
    'Entropy of their importance (nats)': '/attention/router_entropy',
  }
  with plots.new_figure(path, height=3.0) as figure:
    histories = {t: plots.curves(rows, n) for t, n in histories.items()}
    share, _ = _draw_histories(figure, figure.add_gridspec(1, 1)[0], histories)
    share.set_ylim(0, 1.02)
    share.yaxis.set_major_formatter('{x:.0%}')


def _draw_histories(figure, place, histories, layers=()):
  """A panel of curves by layer for each title, next to each other."""
  layers = sorted(
    {*layers, *(n for curves in histories.values() for n in curves)}
  )
  colours = plots.layer_colours(layers)
  panels = place.subgridspec(1, len(histories)).subplots()
  for axes, (title, curves) in zip(panels, histories.items(), strict=True):
    axes.set_title(title)
    plots.plot_history(axes, curves, colours)
  if layers:
    names = {layer: layer for layer in layers}
    plots.legend_of_layers(panels[0], names, colours, frameon=True)
  return panels


def _draw_loads(figure, axes, counts):
  layers = sorted(counts)
  load = np.stack([counts[n] / max(counts[n].mean(), 1e-9) for n in layers])
  image = axes.imshow(
    load, aspect='auto', cmap='viridis', vmin=0, interpolation='nearest'
  )
  axes.set_yticks(range(len(layers)), layers)
  axes.set_xlabel('expert')
  axes.set_title('Tokens of each expert in one pass, in units of the mean')
  axes.grid(visible=False)
  figure.colorbar(image, ax=axes)


def _part(arrays, prefix):
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
