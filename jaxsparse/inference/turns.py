# SPDX-License-Identifier: Apache-2.0
"""Turn by turn: what the device is given, and what it has drawn for whom."""

import collections
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxsparse.config.errors import UserError
from jaxsparse.inference.answer import Answer
from jaxsparse.inference.grammar import Guide
from jaxsparse.inference.jobs import Event, Finish, Form, Job
from jaxsparse.inference.masks import MOST_SECONDS, Masks
from jaxsparse.inference.prefix_store import PrefixStore
from jaxsparse.inference.scheduler import Chunk, Scheduler, Task
from jaxsparse.inference.served_adapters import Adapter, NoPlace
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.inference.slot_results import Pending

Deliver = Callable[[list[Event]], Any]
Observe = Callable[[str, float, str], Any]

# Within which a turn reads the ends of several prompts: so long others wait.
_READ_SECONDS = 0.05

_FORMS: tuple[Form, ...] = ('plain', 'sorted', 'logprobs')


class Entry:
  """A job that the engine has; what the device draws for it is told to it."""

  def __init__(
    self, job: Job, deliver: Deliver, submitted: float, tokenizer: Any
  ):
    self.job, self.deliver, self.submitted = job, deliver, submitted
    self.answer = Answer(job, tokenizer)
    self.form: Form = job.sampling.form
    if job.grammar is not None:
      self.form = 'sorted'
    if job.num_logprobs is not None:
      self.form = 'logprobs'
    # Of a job with a grammar: which tokens may be next.
    self.guide: Guide | None = None
    # Of its adapter, once it has a slot, and what its state depends on besides
    # the tokens.
    self.place, self.salt = 0, ''
    # Numbers of read tokens after which the state is kept.
    self.keep_at: frozenset[int] = frozenset()
    # What is drawn later is nobody's: the slot may have another tenant by then.
    self.is_over = False


@dataclasses.dataclass(frozen=True)
class _Step:
  """A program that was given to the device, and whom its results are for."""

  program: str
  pending: Pending
  begun: float
  # Slots in which a token was drawn, and for whom.
  drawers: tuple[tuple[int, Entry], ...] = ()
  # Whose prompt was read, and which tokens of it.
  read: tuple[Entry, Chunk] | None = None


class Turns:
  """The jobs that have come, the slots they have, and steps on their way.

  Args:
    programs: of the device; their state is this object's alone.
    prefix_bytes: of what has been read of prompts.
    root: what that depends on.
    observe: given measures.
    leave_queue: called with a job that waits no more.
    masks: makes what grammars allow, for tokens of this model.
  """

  def __init__(
    self,
    programs: Programs,
    prefix_bytes: int,
    root: str,
    observe: Observe,
    leave_queue: Callable[[Job], Any],
    masks: Masks,
  ):
    size = programs.chunks[0]
    self._programs, self._observe = programs, observe
    self._leave_queue, self._masks = leave_queue, masks
    self.scheduler = Scheduler(programs.num_slots, size)
    self.store = PrefixStore(size, prefix_bytes, root)
    self.entries: dict[str, Entry] = {}
    self._in_flight: list[_Step] = []
    self._events: dict[Deliver, list[Event]] = {}
    self._collected = time.monotonic()
    # Of the last one; as long as a turn has for them until one is known.
    self._chunk_seconds = _READ_SECONDS
    self.counts: collections.Counter[str] = collections.Counter()
    self.steps: collections.Counter[str] = collections.Counter()
    self.finished = dict(stop=0, length=0, abort=0, error=0)
    self.cancelled = dict(waiting=0, reading=0, running=0)

  @property
  def has_work(self) -> bool:
    return bool(self._in_flight) or self.scheduler.has_work

  def add(self, entry: Entry) -> None:
    job = entry.job
    self.entries[job.id] = entry
    is_guided = job.grammar is not None and job.max_tokens > 0
    task = Task(job.id, len(job.tokens), job.max_tokens, is_stepwise=is_guided)
    self.scheduler.add(task)
    if is_guided:
      self._masks.start(entry, job.grammar)

  def put_adapter(self, adapter: Adapter, told: Future[None]) -> None:
    """Puts one in a place, for texts that begin from now on."""
    try:
      self._programs.put_adapter(adapter)
    except (NoPlace, UserError) as error:
      told.set_exception(error)
    else:
      told.set_result(None)

  def take_mask(self, entry: Entry, guide: Guide | None, error: str) -> None:
    """What may be next in a text with a grammar is known, or why it is not."""
    if entry.is_over:
      return
    self._masks.end(entry)
    if guide is None:
      self._end(entry, entry.answer.end('error', error))
    elif guide.is_over:
      self._end(entry, entry.answer.end('stop'))
    else:
      entry.guide = guide
      self.scheduler.release(entry.job.id)

  def cancel(self, job_id: str) -> None:
    if entry := self.entries.get(job_id):
      self.cancelled[self.scheduler.place(job_id)] += 1
      self._end(entry, entry.answer.end('abort'))

  def end_overdue(self) -> None:
    """Ends the jobs whose grammars take too long."""
    for entry in self._masks.overdue():
      error = f'the grammar takes more than {MOST_SECONDS:.0f} seconds.'
      self._end(entry, entry.answer.end('error', error))

  def end_waiting(self, error: str) -> None:
    """Ends the jobs that have no slot."""
    for job_id in self.scheduler.waiting_ids():
      entry = self.entries[job_id]
      self._end(entry, entry.answer.end('abort', error))

  def end_all(self, finish: Finish, error: str) -> None:
    for entry in list(self.entries.values()):
      self._end(entry, entry.answer.end(finish, error))

  def take_events(self) -> dict[Deliver, list[Event]]:
    """What has become of jobs since it was last asked."""
    events, self._events = self._events, {}
    return events

  def turn(self, on_step: Callable[[], Any]) -> None:
    """Gives the device its next work, then reads what it did before.

    Args:
      on_step: called after each program whose results have come.
    """
    self._admit()
    done, self._in_flight = self._in_flight, []
    self._read_prompts()
    if slots := self.scheduler.draw():
      self._decode(slots)
    for step in done:
      self._collect(step)
      on_step()

  def _admit(self) -> None:
    now, admitted = time.monotonic(), self.scheduler.admit()
    for _, job_id in admitted:
      entry = self.entries[job_id]
      self._leave_queue(entry.job)
      self.counts['prompt_tokens'] += len(entry.job.tokens)
      seconds = now - entry.submitted
      entry.answer.note(queue_seconds=seconds)
      self._observe('request_queue_time_seconds', seconds, '')
    for slot, job_id in admitted:
      entry = self.entries[job_id]
      job, version = entry.job, ''
      if job.adapter:
        entry.place, version = self._programs.places.enter(job.adapter)
      # The length comes first, so that no client's salt is like another one.
      entry.salt = f'{len(version)} {version}{job.salt}'
      self._programs.start(slot, job.sampling, entry.place)

  def _read_prompts(self) -> None:
    """One chunk, and after the end of a prompt others while there is time.

    Newcomers that come together are not read one a step, each step with slots
    that have nothing to do.
    """
    left = _READ_SECONDS
    while (slot := self.scheduler.next_reader()) is not None:
      chunk = self._read(slot)
      left -= self._chunk_seconds
      if not chunk.is_last or left < self._chunk_seconds:
        break

  def _read(self, slot: int) -> Chunk:
    entry = self._entry(slot)
    job = entry.job
    is_first = not self.scheduler.num_rows(slot)
    if is_first and job.picture is not None:
      # What is kept of prompts begins with their first token.
      self.steps['see'] += 1
      self._programs.see(slot, job.picture)
    elif is_first and not job.wants_prompt_logprobs:
      self._reuse(slot, entry)
    chunk = self.scheduler.read(slot)
    tokens = np.array(job.tokens[chunk.begin : chunk.end], np.int32)
    begun, is_drawn = time.monotonic(), chunk.is_last and job.max_tokens > 0
    drawers = ((slot, entry),) if is_drawn else ()
    form = entry.form if is_drawn else 'plain'
    mask = entry.guide.mask if is_drawn and entry.guide else None
    if job.wants_prompt_logprobs:
      targets = np.zeros_like(tokens)
      following = job.tokens[chunk.begin + 1 : chunk.end + 1]
      targets[: len(following)] = following
      pending = self._programs.score(
        slot, tokens, targets, is_drawn, form, mask
      )
      program = 'score'
    else:
      pending = self._programs.prefill(slot, tokens, is_drawn, form, mask)
      program = 'prefill'
    self._in_flight.append(
      _Step(program, pending, begun, drawers, (entry, chunk))
    )
    if chunk.end in entry.keep_at:
      self.steps['snapshot'] += 1
      snapshot = self._programs.snapshot(slot)
      self.store.keep(job.tokens, entry.salt, snapshot)
    return chunk

  def _reuse(self, slot: int, entry: Entry) -> None:
    """Begins with what has been read for others."""
    job = entry.job
    self.counts['prefix_cache_queries'] += len(job.tokens)
    if snapshot := self.store.find(job.tokens, entry.salt):
      self.steps['insert'] += 1
      self.counts['prefix_cache_hits'] += snapshot.length
      self._programs.insert(slot, snapshot)
      self.scheduler.skip(slot, snapshot.length)
      entry.answer.note(num_cached=snapshot.length)
    entry.keep_at = self.store.worth_keeping(job.tokens, entry.salt)

  def _decode(self, slots: tuple[int, ...]) -> None:
    num_slots = self._programs.num_slots
    drawers = tuple((slot, self._entry(slot)) for slot in slots)
    form = max((entry.form for _, entry in drawers), key=_FORMS.index)
    is_live = np.zeros(num_slots, bool)
    is_live[list(slots)] = True
    begun = time.monotonic()
    pending = self._programs.decode(is_live, form, self._mask(drawers))
    self._in_flight.append(_Step(form, pending, begun, drawers))
    self._observe('batch_occupancy', len(slots), '')

  def _mask(self, drawers: tuple[tuple[int, Entry], ...]) -> np.ndarray | None:
    """Tokens that may be drawn, a bit for each; None if all of them may be."""
    guided = [(slot, entry.guide) for slot, entry in drawers if entry.guide]
    if not guided:
      return None
    programs = self._programs
    shape = programs.num_slots, -(-programs.vocab_size // 32)
    mask = np.full(shape, 2**32 - 1, np.uint32)
    for slot, guide in guided:
      mask[slot] = guide.mask
    return mask

  def _entry(self, slot: int) -> Entry:
    return self.entries[self.scheduler.tenant(slot)]

  def _collect(self, step: _Step) -> None:
    """Waits for a program, and tells those for whom it has drawn."""
    drawn = step.pending.result()
    # Before the step before it was done, the device had no time for it.
    since, self._collected = max(step.begun, self._collected), time.monotonic()
    seconds = self._collected - since
    if step.read:
      self._chunk_seconds = seconds
    self._observe('step_seconds', seconds, step.program)
    self.steps[step.program] += 1
    if step.read and not step.read[0].is_over:
      entry, chunk = step.read
      if step.program == 'score':
        entry.answer.score(drawn, chunk.begin, chunk.end)
      if chunk.is_last and not entry.job.max_tokens:
        self._end(entry, entry.answer.end('length'))
    for slot, entry in step.drawers:
      if entry.is_over:
        self.counts['wasted_tokens'] += 1
        continue
      self.counts['generation_tokens'] += 1
      event = entry.answer.take(drawn, slot)
      if event.finish:
        self._end(entry, event)
      else:
        self._put(entry, event)
        if entry.guide:
          self._masks.advance(entry, entry.guide, event.tokens[0])

  def _put(self, entry: Entry, event: Event) -> None:
    self._events.setdefault(entry.deliver, []).append(event)

  def _end(self, entry: Entry, event: Event) -> None:
    """Frees whatever the job has, and tells its last event."""
    job = entry.job
    if self.scheduler.place(job.id) == 'waiting':
      self._leave_queue(job)
    self.scheduler.remove(job.id)
    entry.is_over = True
    if entry.place:
      self._programs.places.leave(entry.place)
    self._masks.end(entry)
    del self.entries[job.id]
    self.finished[event.finish] += 1
    self._put(entry, event)
