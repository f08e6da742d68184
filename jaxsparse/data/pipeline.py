# SPDX-License-Identifier: Apache-2.0
"""Batches: a resumable endless stream for training, one pass to validate.

The stream of batches is made of independent lanes. Lane l of L packs every
L-th piece of the shuffled order into B / L rows of each batch, and a process
owns neighbouring lanes. So the global batch is the same for any number of
processes, and so is the state, which is kept lane by lane.

With data.replay a lane has two streams, of the new text and of the one that was
learned before, and takes each row from one of them by its number: the mix hangs
on nothing that a state would have to hold but how many rows were taken.

A run that goes on with another batch size B keeps its L lanes. Where L does not
divide B, neighbouring lanes take turns: L / G of them fill B / G rows of each
batch, G being the greatest common divisor of L and B.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import packing
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer

# tokens, targets, positions, segment_ids, loss_weight: [B, T] each.
Batch = dict[str, np.ndarray]


class TrainIterator:
  """One process's rows of the endless stream of training batches.

  `get_state` gives the state of the batches handed out, however many are
  prepared ahead, as a small tree that `json` can write.
  """

  def __init__(
    self,
    make_lanes: Callable[[int], '_Lanes'],
    config: DataConfig,
  ):
    self._make_lanes = make_lanes
    self._config = config
    self._begin(config.lanes)

  def _begin(self, num_lanes: int) -> None:
    self._lanes = self._make_lanes(num_lanes)
    self._batches = grain.experimental.ThreadPrefetchDatasetIterator(
      self._lanes, self._config.prefetch
    )

  def __iter__(self) -> 'TrainIterator':
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    return self._batches.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where the iterator stood that gave the state.

    Unless `num_lanes` is set, it takes the state's number of lanes, so that
    with another batch size too no row is read twice or left out.

    Args:
      state: of an iterator of the same data and seed, or what `merge_states`
        made of the states of all processes. Lanes of other processes are
        ignored.

    Raises:
      UserError: the state belongs to another corpus, seed or number of lanes,
        or lacks a lane.
    """
    num_lanes = state.get('num_lanes')
    if not self._config.num_lanes and num_lanes not in (
      None,
      self._lanes.num_lanes,
    ):
      self.close()
      self._begin(num_lanes)
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
  pieces = shuffled(corpus.train, seed)
  former = former_key = None
  if config.replay and config.replay_share:
    former = shuffled(corpus.before.train, seed)
    former_key = corpus.before.key

  def make_lane(lane: int, num_lanes: int) -> grain.DatasetIterator | MixedRows:
    part = slice(lane, None, num_lanes)
    rows = iter(
      packing.packed(
        pieces[part],
        tokenizer,
        config.seq_len,
        config.align,
        are_chats=corpus.has_chats,
      )
    )
    if former is None:
      return rows
    replayed = packing.packed(
      former[part], tokenizer, config.seq_len, config.align
    )
    return MixedRows(
      rows, iter(replayed), config.replay_share, lane / num_lanes
    )

  identity = dict(corpus=corpus.key, seed=seed, replay=former_key)
  return in_lanes(config, identity, make_lane, process_index, process_count)


def in_lanes(
  config: DataConfig,
  identity: dict[str, Any],
  make_lane: Callable[[int, int], Any],
  process_index: int,
  process_count: int,
) -> TrainIterator:
  """A process's share of the batches that are made of lanes.

  Args:
    config: sizes and lanes.
    identity: what a saved state must have been made of.
    make_lane: the iterator over the rows of lane l of L.
    process_index: of `process_count`.
    process_count: all processes.

  Raises:
    UserError: the processes do not divide the lanes.
  """

  def make_lanes(num_lanes: int) -> _Lanes:
    num_groups = math.gcd(num_lanes, config.batch_size)
    if num_groups % process_count:
      raise UserError(
        f'data.num_lanes = {num_lanes} must be a multiple of the '
        f'{process_count} processes: change data.num_lanes or data.batch_size.'
        if num_groups == num_lanes
        else f'data.batch_size = {config.batch_size} and the {num_lanes} lanes '
        f'of this run have {num_groups} as their greatest common divisor, '
        f'which must be a multiple of the {process_count} processes: change '
        'data.batch_size.'
      )
    owned = num_lanes // process_count
    return _Lanes(
      identity=dict(identity, num_lanes=num_lanes),
      lanes={
        lane: make_lane(lane, num_lanes)
        for lane in range(process_index * owned, (process_index + 1) * owned)
      },
      lanes_per_group=num_lanes // num_groups,
      rows_per_group=config.batch_size // num_groups,
    )

  return TrainIterator(make_lanes, config)


def shuffled(pieces: Sequence[Any], seed: int) -> grain.MapDataset:
  """The pieces without an end, in an order of its own for every epoch."""
  return (
    grain.MapDataset.source(pieces)
    # Grain gives the next epoch the next seed; neighbouring seeds of ours
    # must not share epochs.
    .shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    .repeat()
  )


class MixedRows:
  """The rows of two streams in fixed shares."""

  def __init__(
    self,
    rows: grain.DatasetIterator,
    replayed: grain.DatasetIterator,
    share: float,
    phase: float,
  ):
    """Takes row n from `replayed` where n share + phase passes a whole number.

    Args:
      rows: the first stream.
      replayed: the other one.
      share: of its rows.
      phase: from 0 to 1; of lanes whose phases are spread out, as many rows are
        replayed in each batch.
    """
    self._streams = [rows, replayed]
    self._share, self._phase = share, phase
    self._taken = 0

  def __iter__(self) -> 'MixedRows':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    before, after = (
      math.floor(n * self._share + self._phase)
      for n in (self._taken, self._taken + 1)
    )
    row = next(self._streams[after > before])
    self._taken += 1
    return row

  def get_state(self) -> dict[str, Any]:
    rows, replayed = (stream.get_state() for stream in self._streams)
    return dict(rows=rows, replayed=replayed, taken=self._taken)

  def set_state(self, state: dict[str, Any]) -> None:
    for stream, name in zip(self._streams, ('rows', 'replayed'), strict=True):
      stream.set_state(state[name])
    self._taken = state['taken']


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
  owned = owned_rows(config, process_count)
  rows = packing.packed(
    grain.MapDataset.source(corpus.validation),
    tokenizer,
    config.seq_len,
    config.align,
    are_chats=corpus.has_chats,
  )
  return _padded_batches(
    iter(rows), config.batch_size, process_index * owned, owned
  )


def owned_rows(config: DataConfig, process_count: int) -> int:
  """Rows of each batch that a process has.

  Raises:
    UserError: the processes do not divide the batch.
  """
  if config.batch_size % process_count:
    raise UserError(
      f'data.batch_size = {config.batch_size} must be a multiple of the '
      f'{process_count} processes.'
    )
  return config.batch_size // process_count


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
    lanes: dict[int, grain.DatasetIterator | MixedRows],
    lanes_per_group: int,
    rows_per_group: int,
  ):
    self._identity = identity
    self._lanes = lanes
    self._size = lanes_per_group
    self._rows = rows_per_group
    # The lane of each group whose row is the next.
    self._turn = 0

  @property
  def num_lanes(self) -> int:
    return self._identity['num_lanes']

  def __iter__(self) -> '_Lanes':
    return self

  def __next__(self) -> Batch:
    lanes = list(self._lanes.values())
    batch = packing.stack(
      [
        next(lanes[first + (self._turn + row) % self._size])
        for first in range(0, len(lanes), self._size)
        for row in range(self._rows)
      ]
    )
    self._turn = (self._turn + self._rows) % self._size
    return batch

  def get_state(self) -> dict[str, Any]:
    lanes = {str(lane): rows.get_state() for lane, rows in self._lanes.items()}
    return dict(self._identity, lanes=lanes, turn=self._turn)

  def set_state(self, state: dict[str, Any]) -> None:
    for lane, rows in self._lanes.items():
      rows.set_state(_with_tuples(state['lanes'][str(lane)]))
    # Of groups of another size, or of none, where lanes did not take turns.
    self._turn = state.get('turn', 0) % self._size

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
