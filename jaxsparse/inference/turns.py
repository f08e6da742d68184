# SPDX-License-Identifier: Apache-2.0
"""Turn by turn: what the device is given, and what it has drawn for whom."""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsparse.inference.answer import Answer
from jaxsparse.inference.jobs import Event, Finish, Form, Job
from jaxsparse.inference.prefix_store import PrefixStore
from jaxsparse.inference.scheduler import Chunk, Scheduler, Task
from jaxsparse.inference.slot_programs import Pending, Programs

Deliver = Callable[[list[Event]], Any]
Observe = Callable[[str, float, str], Any]

_FORMS: tuple[Form, ...] = ('plain', 'sorted', 'logprobs')


class Entry:
  """A job that the engine has; what the device draws for it is told to it."""

  def __init__(
    self, job: Job, deliver: Deliver, submitted: float, tokenizer: Any
  ):
    self.job, self.deliver, self.submitted = job, deliver, submitted
    self.answer = Answer(job, tokenizer)
    self.form: Form = (
      'logprobs' if job.num_logprobs is not None else job.sampling.form
    )
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
  """

  def __init__(
    self,
    programs: Programs,
    prefix_bytes: int,
    root: str,
    observe: Observe,
    leave_queue: Callable[[Job], Any],
  ):
    size = programs.chunks[0]
    self._programs, self._observe = programs, observe
    self._leave_queue = leave_queue
    self.scheduler = Scheduler(programs.num_slots, size)
    self.store = PrefixStore(size, prefix_bytes, root)
    self.entries: dict[str, Entry] = {}
    self._in_flight: list[_Step] = []
    self._events: dict[Deliver, list[Event]] = {}
    self._collected = time.monotonic()
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
    self.scheduler.add(Task(job.id, len(job.tokens), job.max_tokens))

  def cancel(self, job_id: str) -> None:
    if entry := self.entries.get(job_id):
      self.cancelled[self.scheduler.place(job_id)] += 1
      self._end(entry, entry.answer.end('abort'))

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
    if (slot := self.scheduler.next_reader()) is not None:
      self._read(slot)
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
      self._observe('request_queue_time_seconds', now - entry.submitted, '')
    for slot, job_id in admitted:
      self._programs.start(slot, self.entries[job_id].job.sampling)

  def _read(self, slot: int) -> None:
    entry = self._entry(slot)
    job = entry.job
    if not (self.scheduler.num_rows(slot) or job.wants_prompt_logprobs):
      self._reuse(slot, entry)
    chunk = self.scheduler.read(slot)
    tokens = np.array(job.tokens[chunk.begin : chunk.end], np.int32)
    begun, is_drawn = time.monotonic(), chunk.is_last and job.max_tokens > 0
    drawers = ((slot, entry),) if is_drawn else ()
    form = entry.form if is_drawn else 'plain'
    if job.wants_prompt_logprobs:
      targets = np.zeros_like(tokens)
      following = job.tokens[chunk.begin + 1 : chunk.end + 1]
      targets[: len(following)] = following
      pending = self._programs.score(slot, tokens, targets, is_drawn, form)
      program = 'score'
    else:
      pending = self._programs.prefill(slot, tokens, is_drawn, form)
      program = 'prefill'
    self._in_flight.append(
      _Step(program, pending, begun, drawers, (entry, chunk))
    )
    if chunk.end in entry.keep_at:
      self.steps['snapshot'] += 1
      snapshot = self._programs.snapshot(slot)
      self.store.keep(job.tokens, job.salt, snapshot)

  def _reuse(self, slot: int, entry: Entry) -> None:
    """Begins with what has been read for others."""
    job = entry.job
    self.counts['prefix_cache_queries'] += len(job.tokens)
    if snapshot := self.store.find(job.tokens, job.salt):
      self.steps['insert'] += 1
      self.counts['prefix_cache_hits'] += snapshot.length
      self._programs.insert(slot, snapshot)
      self.scheduler.skip(slot, snapshot.length)
      entry.answer.begin(snapshot.length)
    entry.keep_at = self.store.worth_keeping(job.tokens, job.salt)

  def _decode(self, slots: tuple[int, ...]) -> None:
    num_slots = self._programs.num_slots
    drawers = tuple((slot, self._entry(slot)) for slot in slots)
    form = max((entry.form for _, entry in drawers), key=_FORMS.index)
    is_live = np.zeros(num_slots, bool)
    is_live[list(slots)] = True
    begun = time.monotonic()
    pending = self._programs.decode(is_live, form, None)
    self._in_flight.append(_Step(form, pending, begun, drawers))
    self._observe('batch_occupancy', len(slots), '')

  def _entry(self, slot: int) -> Entry:
    return self.entries[self.scheduler.tenant(slot)]

  def _collect(self, step: _Step) -> None:
    """Waits for a program, and tells those for whom it has drawn."""
    drawn = step.pending.result()
    # Before the step before it was done, the device had no time for it.
    since, self._collected = max(step.begun, self._collected), time.monotonic()
    self._observe('step_seconds', self._collected - since, step.program)
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

  def _put(self, entry: Entry, event: Event) -> None:
    self._events.setdefault(entry.deliver, []).append(event)

  def _end(self, entry: Entry, event: Event) -> None:
    """Frees whatever the job has, and tells its last event."""
    job = entry.job
    if self.scheduler.place(job.id) == 'waiting':
      self._leave_queue(job)
    self.scheduler.remove(job.id)
    entry.is_over = True
    del self.entries[job.id]
    self.finished[event.finish] += 1
    self._put(entry, event)
