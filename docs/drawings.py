# SPDX-License-Identifier: Apache-2.0
"""The pictures of the README and the documentation."""

import ast
import math
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import results_decode
import results_quantized
import results_tables
from matplotlib.patches import FancyBboxPatch

matplotlib.use('Agg')
PACKAGE = pathlib.Path(__file__).parents[1] / 'jaxsparse'

_INK, _GREY, _BLUE, _ORANGE = '#1f2933', '#9aa5b1', '#2563eb', '#ea580c'
_STYLE = {
  'figure.facecolor': 'white',
  'axes.facecolor': 'white',
  'axes.edgecolor': _INK,
  'axes.labelcolor': _INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'font.size': 12,
  'text.color': _INK,
  'xtick.color': _INK,
  'ytick.color': _INK,
}
_COLORS = dict(dense=_GREY, moe=_ORANGE)

# Labels of points that lie near others, in points to the right and up.
_BESIDE = {
  'tables int4': (2, 24),
  'tables int4 clipped': (-2, -20),
  'tables 3 bits': (-52, 12),
  'tables int8': (-8, 10),
  'dense nf4': (6, -11),
  'dense int8': (6, 8),
  'both int8': (4, -14),
  'dense int8 and tables int4': (-40, 14),
}

# What each room is for, on its floor.
ROOMS = dict(
  config='settings and their checks',
  mesh='devices and axes',
  data='text to batches',
  run='flags, workdir, checkpoints',
  ops='pure functions and oracles',
  nn='Flax modules',
  analysis='costs, budgets, pictures',
  training='step, loop, optimizers',
  inference='decoding, sampling',
  interop='models in and out',
  serving='models over HTTP',
  evaluation='tasks, scores, differences',
  experiments='compare, bench',
  cli='the commands',
)


def recalled() -> dict[str, np.ndarray]:
  """Recall of 24,000 facts by seeds, %, least first."""
  shares = results_tables.by_seed('compare_facts_24000', 'recall', 4000)
  by_mean = sorted(shares.items(), key=lambda item: np.mean(item[1]))
  return {name: 100 * np.array(x) for name, x in by_mean}


def decode_times() -> dict[str, dict[int, float]]:
  """Milliseconds of a decode step on an H200, by model and batch."""
  found = {}
  for cell in results_decode.h200_cells():
    if cell['task'].startswith('KV /8, uniform'):
      times = found.setdefault(cell['contender'], {})
      times[cell['batch_size']] = 1e3 * cell['seconds']
  return {n: dict(sorted(times.items())) for n, times in found.items()}


def draw_headline(file: pathlib.Path) -> None:
  """Recall and decode time: what sparse models give, and what they cost."""
  with plt.rc_context(_STYLE):
    figure, (left, right) = plt.subplots(
      1, 2, figsize=(11, 4.2), layout='constrained'
    )
    for place, (name, shares) in enumerate(recalled().items()):
      color = _COLORS.get(name, _BLUE)
      left.barh(place, shares.mean(), color=color, alpha=0.85)
      left.plot(shares, [place] * len(shares), 'o', color=_INK, ms=3)
      left.text(
        max(shares.max(), shares.mean()) + 2,
        place,
        f'{shares.mean():.0f} %',
        va='center',
      )
    left.set_yticks(
      range(len(recalled())), [results_tables.NAMES[n] for n in recalled()]
    )
    left.set_xlim(0, 108)
    left.set_xlabel('recalled, % (dots: three seeds)')
    left.set_title('24,000 facts, equal FLOPs a token', loc='left')
    for name, times in decode_times().items():
      if name == 'pkm':
        continue
      color = _COLORS.get(name, _BLUE)
      right.plot(times.keys(), times.values(), 'o-', color=color, lw=2)
      right.annotate(
        results_tables.NAMES[name],
        (max(times), times[max(times)]),
        xytext=(8, 0),
        textcoords='offset points',
        va='center',
        color=color,
      )
    batches = sorted(decode_times()['dense'])
    right.set_xscale('log', base=4)
    right.minorticks_off()
    right.set_xticks(batches, [str(b) for b in batches])
    right.set_xlim(0.85, 1100)
    right.set_ylim(bottom=0)
    right.set_xlabel('sequences at once')
    right.set_ylabel('ms a step')
    right.set_title('Decoding, 680M family, one H200', loc='left')
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_quantized(file: pathlib.Path) -> None:
  """What quantized forms lose for their bytes, and the time of a bag."""
  with plt.rc_context(_STYLE):
    figure, (left, right) = plt.subplots(
      1, 2, figsize=(11, 4.2), layout='constrained', width_ratios=(3, 2)
    )
    found = results_quantized.losses('`ultramem:tiny`')
    for name, r in found.items():
      # The control would flatten all else; keys and values are no part.
      if name in ('f32', 'tables zero', 'KV int8'):
        continue
      color = dict(tables=_BLUE, both=_INK).get(name.split()[0], _ORANGE)
      color = _INK if ' and ' in name else color
      size = (r['table_bytes'] + r['dense_bytes']) / 1e6
      left.errorbar(
        size, r['lost'], 2 * r['lost_stderr'], fmt='o', color=color, capsize=3
      )
      left.annotate(
        name,
        (size, r['lost']),
        xytext=_BESIDE.get(name, (6, 5)),
        textcoords='offset points',
        fontsize=8,
        color=color,
      )
    left.axhline(0, color=_GREY, lw=1)
    whole = found['f32']['table_bytes'] + found['f32']['dense_bytes']
    left.set_xlim(0, whole / 1e6)
    left.set_xlabel(f'MB of the model (float32: {whole / 1e6:.1f})')
    left.set_ylabel('bits per byte lost (two errors)')
    left.set_title('ultramem:tiny, three seeds', loc='left')
    bags = {
      name: r['ratio']
      for (task, name), r in results_quantized.times().items()
      if task.startswith('bag')
    }
    for place, (name, ratio) in enumerate(reversed(bags.items())):
      right.barh(place, ratio, color=_GREY if name == 'f32' else _BLUE)
      right.text(ratio, place, f' {ratio:.2f}x', va='center')
    right.set_yticks(range(len(bags)), list(reversed(bags)))
    right.set_xlim(0, 1.2 * max(bags.values()))
    right.set_xlabel('time of a bag, to float32')
    right.set_title('Rows of 256, a CPU', loc='left')
    figure.savefig(file, dpi=110)
    plt.close(figure)


def imports() -> dict[str, set[str]]:
  """Room -> the rooms that its files import."""
  found = {}
  for file in PACKAGE.rglob('*.py'):
    room = _room_of(file.relative_to(PACKAGE).parts)
    if room not in ROOMS:
      continue
    for node in ast.walk(ast.parse(file.read_text())):
      names = []
      if isinstance(node, ast.ImportFrom) and node.module:
        names = [f'{node.module}.{alias.name}' for alias in node.names]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      for name in names:
        if name.startswith('jaxsparse.'):
          found.setdefault(room, set()).add(name.split('.')[1])
  return {
    room: found.get(room, set()) & ROOMS.keys() - {room} for room in ROOMS
  }


def _room_of(parts: tuple[str, ...]) -> str:
  return parts[0].removesuffix('.py')


def floors() -> dict[str, int]:
  """Room -> one more than the highest floor that it stands on."""
  graph, placed = imports(), {}
  while len(placed) < len(graph):
    ready = [
      room
      for room, below in graph.items()
      if room not in placed and below <= placed.keys()
    ]
    if not ready:
      raise ValueError(f'imports go round: {graph.keys() - placed.keys()}')
    for room in ready:
      placed[room] = 1 + max((placed[r] for r in graph[room]), default=0)
  return placed


def draw_architecture(file: pathlib.Path) -> None:
  """Rooms on their floors; an arrow leads to what a room imports next below."""
  graph, floor_of = imports(), floors()
  top = max(floor_of.values())
  place, width, height = {}, 3.4, 0.78
  for floor in range(1, top + 1):
    rooms = [room for room in ROOMS if floor_of[room] == floor]
    apart = 4.6 if len(rooms) < 3 else 3.9
    for i, room in enumerate(rooms):
      x = (i - (len(rooms) - 1) / 2) * apart
      place[room] = (x, 1.35 * floor)
  with plt.rc_context(_STYLE):
    figure, axes = plt.subplots(figsize=(11, 1.05 * top + 0.4))
    for room, below in graph.items():
      # What another room on the way imports too needs no arrow of its own.
      implied = set().union(*(_all_below(graph, r) for r in below))
      for other in below - implied:
        (x, y), (to_x, to_y) = place[room], place[other]
        # Past a room between, on its outer side.
        is_far = floor_of[room] - floor_of[other] > 1
        side = math.copysign(0.42 * width, x) if is_far else 0
        bend = math.copysign(0.35, -x) if is_far and x == to_x else 0
        axes.annotate(
          '',
          (to_x + side, to_y + height / 2),
          (x + side, y - height / 2),
          # Behind the rooms that it passes.
          zorder=0,
          arrowprops=dict(
            arrowstyle='-|>',
            color=_GREY,
            lw=1.4,
            connectionstyle=f'arc3,rad={bend}',
          ),
        )
    for room, (x, y) in place.items():
      axes.add_patch(
        FancyBboxPatch(
          (x - width / 2, y - height / 2),
          width,
          height,
          boxstyle='round,pad=0.02,rounding_size=0.12',
          facecolor='#eff6ff',
          edgecolor=_BLUE,
        )
      )
      axes.text(x, y + 0.13, room, ha='center', va='center', weight='bold')
      axes.text(x, y - 0.19, ROOMS[room], ha='center', va='center', fontsize=9)
    for floor in range(1, top + 1):
      axes.text(-6.2, 1.35 * floor, str(floor), va='center', color=_GREY)
    axes.set_xlim(-6.4, 5.8)
    axes.set_ylim(0.75, 1.35 * top + 0.6)
    axes.axis('off')
    figure.savefig(file, dpi=110, bbox_inches='tight')
    plt.close(figure)


def _all_below(graph, room):
  found = set(graph[room])
  for other in graph[room]:
    found |= _all_below(graph, other)
  return found


def draw_all(folder: pathlib.Path) -> None:
  folder.mkdir(exist_ok=True)
  draw_headline(folder / 'headline.png')
  draw_quantized(folder / 'quantized.png')
  draw_architecture(folder / 'architecture.png')
