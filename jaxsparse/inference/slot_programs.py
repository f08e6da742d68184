# SPDX-License-Identifier: Apache-2.0
"""The programs of a fixed number of slots, compiled once and for all.

Every call runs an executable: what has another shape, type or sharding raises
an error, and nothing is compiled while somebody waits. The state of all slots
is one donated tree with one owner; calls come from one thread.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.data.pictures.augment import scaled
from jaxsparse.inference import slot_executables, slot_sampling, slots
from jaxsparse.inference.batch_rows import padded
from jaxsparse.inference.jobs import Form, JobSampling
from jaxsparse.inference.long_input import with_bounded_history
from jaxsparse.inference.row_cache import RowCaches, is_used
from jaxsparse.inference.served_adapters import Adapter, Places
from jaxsparse.inference.sight import Sight
from jaxsparse.inference.slot_model import SlotModel
from jaxsparse.inference.slot_results import Part, Pending, Snapshot
from jaxsparse.ops.sparse_attention.bounded_slots import needs_room

# Of a slot whose history is bounded: positions have 32 bits.
_ENDLESS = 2**31 - 1


class Programs:
  """All that is done to slots; made by `Programs.compile`.

  Attributes:
    config: of the model.
    num_slots: sequences at once, B.
    length: tokens for which a slot has room, with a picture or without.
    chunks: lengths of the programs that read prompts, falling.
    vocab_size: of the model, V.
    stop_ids: tokens that end an answer.
    num_compiled: executables.
    state_bytes: of all slots, on all devices together.
    row_caches: of tables on the host; None without.
    places: of adapters; None without.
    sight: of pictures; None of a model of text alone.
  """

  @classmethod
  def compile(
    cls,
    config: ModelConfig,
    params: dict,
    num_slots: int,
    length: int,
    chunks: Sequence[int] = (256, 64, 16),
    history_blocks: int | None = None,
    progress: Callable[[int, int, str], Any] = lambda done, total, name: None,
    stop_ids: tuple[int, ...] = (),
    is_lazy: bool = False,
    places: Places | None = None,
    sight: Sight | None = None,
  ) -> Self:
    """Compiles everything, and makes the slots.

    Args:
      config: with vocab_size set.
      params: on one device, or on a mesh of shape (1, 1, n).
      num_slots: sequences at once.
      length: tokens of the longest sequence, its answer included.
      chunks: tokens that are read at once: the first one where a prompt has as
        many left, else the shortest that holds the rest.
      history_blocks: of sparse attention with a history of bounded size, with
        which a sequence may be of any length; 0 for what `length` holds; None
        keeps all.
      progress: told before each program how many are done, of how many, and
        its name.
      stop_ids: tokens that end an answer.
      is_lazy: compile each program when it is first needed: where nobody waits,
        and most are not.
      places: of the adapters in the parameters, see `served_adapters`.
      sight: of pictures.

    Raises:
      UserError: a number is below 1, the mesh splits sequences, or the model
        can't forget.
    """
    return cls(
      config, params, num_slots, length, chunks, history_blocks, progress,
      stop_ids, is_lazy, places, sight,
    )  # fmt: skip

  def __init__(
    self, config, params, num_slots, length, chunks, history_blocks, progress,
    stop_ids, is_lazy, places, sight,
  ):  # fmt: skip
    require(num_slots >= 1, f'slots must be at least 1, got {num_slots}.')
    require(length >= 1, f'length must be at least 1, got {length}.')
    require(
      len(chunks) > 0 and min(chunks) >= 1,
      f'chunks must be numbers of tokens above 0, got {tuple(chunks)}.',
    )
    if history_blocks is not None:
      config = with_bounded_history(config, length, history_blocks or None)
    # The longest chunk is of whole blocks, and no longer than it need be.
    block = config.sparse.block if config.sparse else 1
    longest = min(max(chunks), length)
    longest = -(-longest // block) * block
    self.chunks = (
      longest, *sorted({n for n in chunks if n < longest}, reverse=True)
    )  # fmt: skip
    self.config, self.num_slots = config, num_slots
    # With slots that nobody has, where that takes less time.
    self._batch_size = padded(num_slots)
    self.vocab_size, self.stop_ids = config.vocab_size, stop_ids
    self._bounded_rows = slots.rows_of_bounded(config)
    self.length = _ENDLESS if self._bounded_rows else length
    model = SlotModel(config, sight and sight.settings)
    self._num_seen = model.rows_before
    # Chunks of a text begin behind a picture, wherever that ends.
    whole = -(-length // longest) + -(-self._num_seen // longest)
    self._num_rows = whole * longest
    self._params, self.places, self.sight = params, places, sight
    self.row_caches = RowCaches(params) if is_used(params) else None
    self._lengths = np.zeros(num_slots, np.int64)
    # Of each slot: rows of its first chunks that a snapshot has, or had.
    # Whoever keeps snapshots bounds them: here they are not kept alive.
    self._known: list[tuple[weakref.ref, ...]] = [()] * num_slots
    self._has_room = np.zeros(num_slots, bool)
    self._compile(model, progress, is_lazy)

  def _compile(self, model, progress, is_lazy):
    self._run = slot_executables.of(
      model, self._params, self._batch_size, self._num_rows, self.chunks,
      self.stop_ids, self.sight.params if self.sight else {},
    )  # fmt: skip
    names = () if is_lazy else self._run.names
    for i, name in enumerate(names):
      progress(i, len(names), name)
      self._run.compile(name)
    self._state = self._run['init']()
    self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self._state))
    # On the device for good, for steps without a grammar.
    size = slot_executables.words(self.vocab_size)
    everything = [
      np.full((n, size), 2**32 - 1, np.uint32) for n in (self._batch_size, 1)
    ]
    self._all_tokens, self._all_of_one = map(self._run.placed, everything)

  @property
  def num_compiled(self) -> int:
    return len(self._run)

  def lengths(self) -> list[int]:
    """Tokens of each slot that programs were given."""
    return self._lengths.tolist()

  def start(self, slot: int, sampling: JobSampling, place: int = 0) -> None:
    """Takes a slot over: it has read nothing, and draws so from now on.

    Args:
      slot: which one.
      sampling: how it draws.
      place: of its adapter, see `served_adapters`; 0 for none.
    """
    fields = slot_sampling.of_job(sampling)
    self._state = self._run['start'](
      self._state, np.int32(slot), fields, np.int32(place)
    )
    self._stands(slot, 0, ())

  def see(self, slot: int, picture: np.ndarray) -> None:
    """Shows a picture to a slot that has read nothing.

    Args:
      slot: which one.
      picture: uint8 [S, S, 3].
    """
    assert self.sight is not None
    self._state = self._run['see'](
      self._state, self._params, self.sight.params, np.int32(slot),
      scaled(picture)[None],
    )  # fmt: skip
    self._stands(slot, self._num_seen, ())

  def put_adapter(self, adapter: Adapter) -> None:
    """Puts one of several adapters in a place that is free.

    Raises:
      NoPlace: there is none.
      UserError: there are no places, or it does not fit into one.
    """
    require(self.places is not None, 'the programs have no adapters.')
    self._params = self.places.put(self._params, adapter)

  def prefill(
    self,
    slot: int,
    tokens: Sequence[int] | np.ndarray,
    is_last: bool,
    form: Form = 'plain',
    mask: np.ndarray | None = None,
  ) -> Pending:
    """Reads tokens, from where the slot stands on.

    All calls but the last one of a prompt bring `chunks[0]` tokens.

    Args:
      slot: which one.
      tokens: 1 to `chunks[0]`.
      is_last: whether the slot's first token is to be drawn.
      form: with 'logprobs' the result has them.
      mask: uint32 [V / 32], the tokens that may be drawn; None for all.
    """
    inputs, n = self._chunk(slot, tokens, is_last, mask)
    token, best = self._called(f'prefill_{n}', *inputs)
    best = best if form == 'logprobs' else None
    return Pending(token, best, place=(slot, self.num_slots))

  def score(
    self,
    slot: int,
    tokens: Sequence[int] | np.ndarray,
    targets: Sequence[int] | np.ndarray,
    is_last: bool,
    form: Form = 'plain',
    mask: np.ndarray | None = None,
  ) -> Pending:
    """`prefill` that also tells how probable the tokens `targets` are.

    They are as many as `tokens`, each the one that follows: what stands for the
    one after the prompt is of no influence on the others.
    """
    inputs, n = self._chunk(slot, tokens, is_last, mask)
    padded = np.zeros(n, np.int32)
    padded[: len(tokens)] = targets
    token, best, of_prompt = self._called(f'score_{n}', *inputs, padded)
    best = best if form == 'logprobs' else None
    place = (slot, self.num_slots)
    return Pending(token, best, (of_prompt, len(tokens)), place)

  def _chunk(self, slot, tokens, is_last, mask):
    count, begin = len(tokens), int(self._lengths[slot])
    n = min((n for n in self.chunks if n >= count), default=0)
    if not (count and n) or (begin + n > self._num_rows and not self.endless):
      raise ValueError(
        f'{count} tokens after {begin} fit no chunk of {self.chunks} in '
        f'{self._num_rows} rows.'
      )
    padded = np.zeros((1, n), np.int32)
    padded[0, :count] = tokens
    of_one = self._all_of_one
    if mask is not None:
      of_one = np.asarray(mask, np.uint32)[None]
    # A chunk makes its own room.
    self._stands(slot, begin + count, self._known[slot])
    return (
      self._state, self._params, np.int32(slot), padded, np.int32(count),
      np.bool_(is_last), of_one,
    ), n  # fmt: skip

  @property
  def endless(self) -> bool:
    """Whether a slot has room for any number of tokens."""
    return self._bounded_rows > 0

  def decode(
    self,
    is_live: np.ndarray,
    form: Form = 'plain',
    mask: np.ndarray | None = None,
  ) -> Pending:
    """Feeds each live slot its last token and draws the next one.

    Args:
      is_live: bool [B]; the other slots stay as they are.
      form: 'plain' where no live slot wants more, see `JobSampling.form`;
        'logprobs' does all and tells log-probabilities.
      mask: uint32 [B, V / 32], the tokens that may be drawn; None for all.
    """
    if form == 'plain' and mask is not None:
      form = 'sorted'
    due = [
      slot
      for slot in range(self.num_slots)
      if self.needs_forget(int(self._lengths[slot]))
    ]
    # Also for those that stay: what is written for them goes to their next row.
    self.forget(due)
    is_live = np.asarray(is_live, np.bool_)
    inputs = (self._state, self._params, self._with_spare(is_live))
    if form != 'plain':
      inputs += (
        self._all_tokens
        if mask is None
        else self._with_spare(np.asarray(mask, np.uint32)),
      )
    token, best = self._called(form, *inputs)
    self._lengths += is_live
    self._has_room &= ~is_live
    return Pending(token, best, place=(None, self.num_slots))

  def _with_spare(self, x):
    """`x` [B, ...] of all slots, with zeros for those that nobody has."""
    num_spare = self._batch_size - self.num_slots
    return np.pad(x, ((0, num_spare),) + ((0, 0),) * (x.ndim - 1))

  def _called(self, name: str, *inputs: Any) -> tuple:
    """What a program of the model gives beside the state."""
    self._state, token, best, rows, *others = self._run[name](*inputs)
    if self.row_caches is not None:
      self._params = self.row_caches.after(self._params, rows)
    return token, best, *others

  def needs_forget(self, length: int) -> bool:
    """Whether a slot of so many tokens forgets before its next one."""
    if not self.endless:
      return False
    return needs_room(length, self._bounded_rows, self.config.sparse.block)

  def forget(self, slots: Sequence[int]) -> None:
    """Makes room in slots that need it, once; `decode` does so by itself."""
    for slot in slots:
      if not self._has_room[slot]:
        self._state = self._run['forget'](self._state, np.int32(slot))
        self._has_room[slot] = True

  def snapshot(self, slot: int) -> Snapshot:
    """The slot as it is, to be inserted where the same tokens begin.

    Raises:
      ValueError: it has not read a multiple of `chunks[0]` tokens.
    """
    length, size = int(self._lengths[slot]), self.chunks[0]
    if not length or length % size:
      raise ValueError(f"a slot of {length} tokens is not at a chunk's end.")
    known, num_chunks = self._living(slot), length // size
    if self.endless:
      # Nothing lies where it was written.
      known, num_chunks = (), 1
    rest = None
    for i in range(min(len(known), num_chunks - 1), num_chunks):
      rows, rest = self._run['snapshot'](
        self._state, np.int32(slot), np.int32(i * size)
      )
      if i >= len(known):
        known = (*known, Part(rows))
    self._known[slot] = tuple(map(weakref.ref, known))
    return Snapshot(length, known[:num_chunks], Part(rest))

  def insert(self, slot: int, snapshot: Snapshot) -> None:
    """Puts a slot where the snapshot was taken; how it draws stays."""
    for i, chunk in enumerate(snapshot.chunks):
      self._state = self._run['insert'](
        self._state,
        np.int32(slot),
        np.int32(i * self.chunks[0]),
        (chunk.arrays, snapshot.rest.arrays),
      )
    known = tuple(map(weakref.ref, snapshot.chunks))
    self._stands(slot, snapshot.length, known)

  def _living(self, slot: int) -> tuple[Part, ...]:
    """The slot's first chunks that some snapshot still has."""
    parts = (reference() for reference in self._known[slot])
    return tuple(itertools.takewhile(lambda part: part is not None, parts))

  def _stands(self, slot, length, known):
    self._lengths[slot] = length
    self._known[slot] = known
    self._has_room[slot] = False
