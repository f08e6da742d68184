"""Batches: a resumable endless stream for training, one pass to validate.

The stream of batches is made of independent lanes. Lane l of L packs every
L-th piece of the shuffled order into B / L rows of each batch, and a process
owns neighbouring lanes. So the global batch is the same for any number of
processes, and so is the state, which is kept lane by lane.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxsparse.config import DataConfig
from jaxsparse.data import packing
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.errors import UserError

# tokens, targets, positions, segment_ids, loss_weight: [B, T] each.
Batch = dict[str, np.ndarray]


class TrainIterator:
  """One process's rows of the endless stream of training batches.

  `get_state` gives the state of the batches handed out, however many are
  prepared ahead, as a small tree that `json` can write.
  """

  def __init__(self, lanes: '_Lanes', prefetch: int):
    self._lanes = lanes
    self._batches = grain.experimental.ThreadPrefetchDatasetIterator(
      lanes, prefetch
    )

  def __iter__(self) -> 'TrainIterator':
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    return self._batches.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where the iterator stood that gave the state.

    Args:
      state: of an iterator with the same lanes, or what `merge_states` made
        of the states of all processes. Lanes of other processes are ignored.

    Raises:
      UserError: the state belongs to another corpus, seed or number of lanes,
        or lacks a lane.
    """
    self._lanes.require_fit(state)
    self._batches.set_state(state)

  def close(self) -> None:
    """Ends the thread that prepares batches."""
    self._batches.close()


def train_iterator(
  config: DataConfig,
  corpus: Corpus,
  tokenizer: Tokenizer,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> TrainIterator:
  """The rows of `process_index` of the endless stream of batches [B, T].

  Every epoch has an order of its own, that of `seed` alone. Each batch has
  B / process_count rows here; those of all processes, in their order, make up
  the global batch.

  Raises:
    UserError: the processes do not divide the lanes.
  """
  num_lanes = config.lanes
  if num_lanes % process_count:
    raise UserError(
      f'data.num_lanes = {num_lanes} must be a multiple of the '
      f'{process_count} processes: change data.num_lanes or data.batch_size.'
    )
  pieces = (
    grain.MapDataset.source(corpus.train)
    # Grain gives the next epoch the next seed; neighbouring seeds of ours
    # must not share epochs.
    .shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    .repeat()
  )
  owned = num_lanes // process_count
  lanes = _Lanes(
    identity=dict(corpus=corpus.key, seed=seed, num_lanes=num_lanes),
    lanes={
      lane: iter(
        packing.packed(
          pieces[lane::num_lanes], tokenizer, config.seq_len, config.align
        )
      )
      for lane in range(process_index * owned, (process_index + 1) * owned)
    },
    rows_per_lane=config.batch_size // num_lanes,
  )
  return TrainIterator(lanes, config.prefetch)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The state of all processes' iterators together."""
  lanes = functools.reduce(dict.__or__, (state['lanes'] for state in states))
  return dict(states[0], lanes=lanes)


def validation_batches(
  config: DataConfig,
  corpus: Corpus,
  tokenizer: Tokenizer,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """One pass over the validation split in order, padded at its end.

  Every process gets the same number of batches of B / process_count rows.

  Raises:
    UserError: the processes do not divide the batch.
  """
  if config.batch_size % process_count:
    raise UserError(
      f'data.batch_size = {config.batch_size} must be a multiple of the '
      f'{process_count} processes.'
    )
  rows = packing.packed(
    grain.MapDataset.source(corpus.validation),
    tokenizer,
    config.seq_len,
    config.align,
  )
  owned = config.batch_size // process_count
  return _padded_batches(
    iter(rows), config.batch_size, process_index * owned, owned
  )


def _padded_batches(
  rows: Iterator[dict[str, np.ndarray]], batch_size: int, start: int, owned: int
) -> Iterator[Batch]:
  batch = []
  for row in rows:
    batch.append(row)
    if len(batch) == batch_size:
      yield packing.stack(batch[start : start + owned])
      batch = []
  if batch:
    padding = {name: np.zeros_like(x) for name, x in batch[0].items()}
    batch += [padding] * (batch_size - len(batch))
    yield packing.stack(batch[start : start + owned])


class _Lanes:
  """Batches of the rows of some lanes, in the lanes' order."""

  def __init__(
    self,
    identity: dict[str, Any],
    lanes: dict[int, grain.DatasetIterator],
    rows_per_lane: int,
  ):
    self._identity = identity
    self._lanes = lanes
    self._rows_per_lane = rows_per_lane

  def __iter__(self) -> '_Lanes':
    return self

  def __next__(self) -> Batch:
    return packing.stack(
      [
        next(rows)
        for rows in self._lanes.values()
        for _ in range(self._rows_per_lane)
      ]
    )

  def get_state(self) -> dict[str, Any]:
    lanes = {str(lane): rows.get_state() for lane, rows in self._lanes.items()}
    return dict(self._identity, lanes=lanes)

  def set_state(self, state: dict[str, Any]) -> None:
    for lane, rows in self._lanes.items():
      rows.set_state(_with_tuples(state['lanes'][str(lane)]))

  def require_fit(self, state: dict[str, Any]) -> None:
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise UserError(
          f'the saved data state has {name} = {state.get(name)!r} and the '
          f'run has {value!r}: resume with the same data, seed and lanes, or '
          'start in another workdir.'
        )
    if missing := [k for k in self._lanes if str(k) not in state['lanes']]:
      raise UserError(
        f'the saved data state lacks the lanes {missing}: merge the states of '
        'all processes that saved it.'
      )


def _with_tuples(state: Any) -> Any:
  """A state whose lists, as `json` reads tuples, are tuples again.

  Grain compares a remainder's slice with a tuple, which no list equals.
  """
  if isinstance(state, dict):
    return {name: _with_tuples(value) for name, value in state.items()}
  return tuple(state) if isinstance(state, list | tuple) else state
