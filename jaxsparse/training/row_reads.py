# SPDX-License-Identifier: Apache-2.0
"""Passes over texts that note which rows of each memory's tables are read.

Rows are those of the tables: layers that share one read windows of it, each in
its place. A memory's table of pre-values has the same rows as its values.
"""

import collections
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.memory.row_ranking import (
  NO_ROW,
  BackgroundCounter,
  NewCounter,
  ReadCounts,
  moved_reads,
)
from jaxsparse.run.progress import Reporter
from jaxsparse.training.evaluation import to_global
from jaxsparse.training.micro_batches import Batch

# Reads [B, T, k] of each memory, by the path of the module that has its tables.
Reads = dict[str, np.ndarray]


def owner_of(config: ModelConfig, block: str) -> str:
  """The path of the module that has the tables which a block reads."""
  assert config.memory is not None
  return 'memory' if config.memory.shared_rows else f'{block}/memory'


@functools.partial(jax.jit, static_argnums=0)
def _rows(config: ModelConfig, params: dict, batch: Batch) -> dict:
  _, sown = Transformer(config).apply(
    {'params': params},
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    mutable=['intermediates'],
  )
  is_padding = batch['segment_ids'][..., None] == 0
  found: dict[str, list[jax.Array]] = {}
  for name, block in sown['intermediates'].items():
    if 'memory' in block:
      rows = jnp.where(is_padding, NO_ROW, block['memory']['rows'][0])
      found.setdefault(owner_of(config, name), []).append(rows)
  # Every process gets all of them.
  return {
    owner: mesh.reshard(jnp.concatenate(rows, axis=-1), mesh.act('...'))
    for owner, rows in found.items()
  }


def reads_of(
  config: ModelConfig, params: dict, batch: dict[str, np.ndarray]
) -> Reads:
  """Reads of one batch, of which a process gives its rows and gets all."""
  return jax.device_get(_rows(config, params, to_global(batch)))


def count(
  config: ModelConfig,
  params: dict,
  new: Iterable[Batch],
  background: Iterable[Batch],
  unit: int,
  reporter: Reporter,
) -> dict[str, ReadCounts]:
  """Reads of the rows that a new text reads, by it and by a background.

  Args:
    config: of the model.
    params: of it, on the mesh in use.
    new: this process's rows of the batches of the new text.
    background: likewise of the other.
    unit: tokens of the background that count as one document.
    reporter: shows the progress.
  """
  first: dict[str, NewCounter] = collections.defaultdict(NewCounter)
  for batch in _shown(new, 'reads of the new text', reporter, True):
    for owner, rows in reads_of(config, params, batch).items():
      first[owner].add(rows)
  counters = {
    owner: BackgroundCounter(*counter.counts(), unit)
    for owner, counter in first.items()
  }
  for batch in _shown(background, 'reads of the background', reporter):
    for owner, rows in reads_of(config, params, batch).items():
      counters[owner].add(rows)
  return {owner: counter.counts() for owner, counter in counters.items()}


def moved_share(
  config: ModelConfig,
  before: dict,
  after: dict,
  batches: Iterable[Batch],
  reporter: Reporter,
) -> float:
  """The share of the reads that training has moved to other rows.

  Keys and queries stay as they are, but what changed rows write is what later
  layers read.

  Args:
    config: of the model.
    before: its parameters.
    after: likewise.
    batches: this process's rows of those of the new text.
    reporter: shows the progress.
  """
  moved = total = 0
  for batch in _shown(batches, 'reads after training', reporter):
    first, then = (reads_of(config, p, batch) for p in (before, after))
    for owner, rows in then.items():
      # By layer, of which a shared table has several.
      num_layers = _num_layers(config, owner)
      for old, new in zip(
        np.split(first[owner], num_layers, axis=-1),
        np.split(rows, num_layers, axis=-1),
        strict=True,
      ):
        other, of = moved_reads(old, new)
        moved, total = moved + other, total + of
  return moved / max(total, 1)


def _num_layers(config: ModelConfig, owner: str) -> int:
  assert config.memory is not None
  return len(config.memory.placements) if owner == 'memory' else 1


def _shown(
  batches: Iterable[Batch], what: str, reporter: Reporter, compiles=False
) -> Iterator[Batch]:
  batches = list(batches)
  total = len(batches)
  with reporter.steps(0, total, what, compiles, unit=f'{what}: batch'):
    for done, batch in enumerate(batches, 1):
      yield batch
      # Ten lines where there is no bar.
      is_logged = done * 10 // total > (done - 1) * 10 // total
      reporter.show(done, total, {}, is_logged=is_logged)
