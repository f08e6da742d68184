# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a model looks at in a text, and a page that shows them.

One PNG a layer: the blocks that a sparse layer keeps and the shares of its
three sets, or the weights of another and how much composition moves them. One
more of what all layers together read: rollout, relevance, Grad-CAM++.
"""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from jaxsparse.analysis import plots
from jaxsparse.config.attention import SparseAttentionConfig
from jaxsparse.run import workdir

PAGE = 'attention.html'

_SETS = ('window', 'kept blocks', 'summaries')
# Pictures of key/value heads of a layer, at most.
_MOST_HEADS = 4
# Tokens up to which the axes name them.
_MOST_NAMED = 48


@runtime_checkable
class Layer(Protocol):
  """As `inference.attention_maps.LayerMaps`."""

  kind: str
  weights: np.ndarray
  uncomposed: np.ndarray | None
  choice: dict[str, np.ndarray]


def draw_layer(
  layer: Layer,
  title: str,
  texts: Sequence[str],
  sparse: SparseAttentionConfig | None,
  path: pathlib.Path,
) -> None:
  """Draws one layer.

  Args:
    layer: its maps.
    title: of the picture.
    texts: each token's.
    sparse: sizes of a sparse layer's blocks and tiles.
    path: of the PNG.
  """
  if layer.kind == 'sparse':
    _draw_sparse(layer, title, sparse.block, sparse.tile, path)
  else:
    _draw_weights(layer, title, texts, path)


def _draw_sparse(layer, title, block, tile, path):
  choice = layer.choice
  length = layer.weights.shape[-1]
  num_heads = min(choice['kept'].shape[0], _MOST_HEADS)
  with plots.new_figure(path, height=2.6 * (num_heads + 1) + 0.5) as figure:
    grid = figure.add_gridspec(num_heads + 1, 3)
    for head in range(num_heads):
      axes = figure.add_subplot(grid[head, :])
      image = axes.imshow(
        block_shares(layer, head, block, tile),
        aspect='auto',
        cmap='viridis',
        vmin=0,
        vmax=1,
        interpolation='nearest',
        extent=(0, choice['kept'].shape[1] * tile, -(-length // block), 0),
      )
      axes.set_xlim(0, length)
      for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
      tiles, blocks = np.array(_kept(choice, head)).T.reshape(2, -1)
      axes.plot(
        (tiles + 0.5) * tile, blocks + 0.5, '.', color='#e69f00', markersize=4
      )
      axes.set_title(f'{title}, key/value head {head}: share of each block')
      axes.set_ylabel(f'block of {block} tokens')
      axes.set_xlabel('position; dots: kept blocks')
      axes.grid(visible=False)
      figure.colorbar(image, ax=axes)
    positions = np.arange(choice['kept'].shape[1]) * tile
    shares = choice['shares'].mean(0)
    shares = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-9)
    axes = figure.add_subplot(grid[-1, 0])
    axes.stackplot(
      positions, shares.T, labels=_SETS, colors=plots.COLOURS[: len(_SETS)]
    )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter('{x:.0%}')
    axes.set_title('Shares, mean of heads')
    axes.set_xlabel('position')
    axes.legend(fontsize=8, loc='lower left', frameon=True)
    axes = figure.add_subplot(grid[-1, 1])
    for name, colour in (('eligible', '#888888'), ('kept', plots.COLOURS[1])):
      axes.plot(positions, choice[name].mean(0), color=colour, label=name)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1))
    axes.set_title('Blocks, mean of heads')
    axes.set_xlabel('position')
    axes.legend(fontsize=8, loc='upper left')
    axes = figure.add_subplot(grid[-1, 2])
    # What the first row of a tile asks for counts.
    covered = choice['coverage'][::tile]
    for head in range(num_heads):
      axes.plot(
        positions,
        covered[:, head],
        color=plots.COLOURS[head],
        label=f'head {head}',
      )
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter('{x:.0%}')
    axes.set_title('Share to be covered')
    axes.set_xlabel('position')
    axes.legend(fontsize=8, loc='lower left', frameon=True)


def block_shares(layer: Layer, head: int, block: int, tile: int) -> np.ndarray:
  """[blocks, tiles]: mean over the head's group and the tile's tokens."""
  length = layer.weights.shape[-1]
  group = len(layer.weights) // len(layer.choice['kept'])
  mine = layer.weights[head * group : (head + 1) * group].mean(0)
  sums = np.add.reduceat(mine, np.arange(0, length, block), axis=1)
  counts = np.add.reduceat(np.ones(length), np.arange(0, length, tile))
  means = np.add.reduceat(sums, np.arange(0, length, tile), axis=0)
  return (means / counts[:, None]).T


def _kept(choice, head):
  """Pairs of a tile and a block that it keeps."""
  tile, candidate = np.nonzero(choice['is_kept'][head])
  return list(zip(tile, choice['block'][head][tile, candidate], strict=True))


def _draw_weights(layer, title, texts, path):
  moved = None
  if layer.uncomposed is not None:
    # Half the sum of changes: the share of a query's weight that went
    # elsewhere, if both have the sum 1.
    moved = 0.5 * np.abs(layer.weights - layer.uncomposed).sum(-1)
  length = layer.weights.shape[-1]
  height = 6.0 + (moved is not None) * 2.5
  with plots.new_figure(path, height=height) as figure:
    ratios = (6, 2.5)[: 1 + (moved is not None)]
    grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
    axes = figure.add_subplot(grid[0])
    mean = layer.weights.mean(0)
    _draw_matrix(figure, axes, mean, texts)
    axes.set_title(f'{title}: weights, mean of heads')
    if moved is not None:
      axes = figure.add_subplot(grid[1])
      image = axes.imshow(
        moved,
        aspect='auto',
        cmap='viridis',
        vmin=0,
        interpolation='nearest',
        extent=(0, length, len(moved), 0),
      )
      axes.xaxis.get_major_locator().set_params(integer=True)
      heads = range(0, len(moved), -(-len(moved) // 8))
      axes.set_yticks([head + 0.5 for head in heads], heads)
      axes.set_title('Weight that composition moves')
      axes.set_xlabel('position')
      axes.set_ylabel('head')
      axes.grid(visible=False)
      figure.colorbar(image, ax=axes)


def _draw_matrix(figure, axes, matrix, texts, quantile=1.0):
  roots = np.sqrt(np.maximum(matrix, 0))
  image = axes.imshow(
    roots,
    cmap='viridis',
    interpolation='nearest',
    vmin=0,
    vmax=np.quantile(roots, quantile) or None,
  )
  axes.grid(visible=False)
  if len(texts) <= _MOST_NAMED:
    names = [repr(text)[1:-1] for text in texts]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
  axes.set_xlabel('read (square roots of the weights)')
  axes.set_ylabel('reads')
  extend = 'neither' if quantile == 1 else 'max'
  figure.colorbar(image, ax=axes, fraction=0.046, pad=0.04, extend=extend)


def draw_tokens(
  totals: Mapping[str, np.ndarray],
  texts: Sequence[str],
  next_text: str,
  path: pathlib.Path,
) -> None:
  """Draws titled maps [T, T] of every token, and of the next one."""
  with plots.new_figure(path, height=3.8 * len(totals)) as figure:
    grid = figure.add_gridspec(len(totals), 2)
    for i, (title, matrix) in enumerate(totals.items()):
      axes = figure.add_subplot(grid[i, 0])
      # A token's own share would outshine all others, and so would a few more.
      others = matrix * (1 - np.eye(len(matrix)))
      _draw_matrix(figure, axes, others, texts, quantile=0.999)
      axes.set_title(f'{title} of all layers')
      axes = figure.add_subplot(grid[i, 1])
      axes.bar(range(len(texts)), last_row(matrix), color=plots.COLOURS[i])
      axes.set_title(f'{title} for {next_text!r}, the next token')
      axes.set_xlabel('position')


def last_row(matrix: np.ndarray) -> np.ndarray:
  """What the next token has of each token but the last."""
  row = np.maximum(matrix[-1], 0).copy()
  row[-1] = 0
  return row / max(row.sum(), 1e-9)


def write_page(
  maps: dict[str, np.ndarray],
  texts: Sequence[str],
  next_text: str,
  pictures: Sequence[pathlib.Path],
  path: pathlib.Path,
) -> None:
  """Writes one HTML file with the text in colours and the pictures in it.

  Args:
    maps: of each title the weights of the tokens, [T].
    texts: each token's.
    next_text: what the model would write next.
    pictures: PNGs.
    path: of the page.
  """
  parts = [
    '<!doctype html><meta charset="utf-8"><title>Attention</title>',
    '<style>body{font:16px sans-serif;max-width:60em;margin:2em auto;'
    'padding:0 1em}img{max-width:100%}pre{white-space:pre-wrap;'
    'line-height:1.6}</style>',
    f'<p>Likeliest next token: <code>{html.escape(repr(next_text))}</code></p>',
  ]
  for title, weights in maps.items():
    most = max(float(weights.max()), 1e-9)
    spans = ''.join(
      f'<span title="{weight:.2%}" style="background:rgba(213,94,0,'
      f'{weight / most:.3f})">{html.escape(text)}</span>'
      for text, weight in zip(texts, weights.tolist(), strict=True)
    )
    parts.append(f'<h2>{html.escape(title)}</h2><pre>{spans}</pre>')
  for picture in pictures:
    data = base64.b64encode(picture.read_bytes()).decode()
    parts.append(
      f'<h2>{html.escape(picture.stem)}</h2>'
      f'<img alt="{html.escape(picture.stem)}" '
      f'src="data:image/png;base64,{data}">'
    )
  workdir.write_whole(path, ('\n'.join(parts) + '\n').encode())
