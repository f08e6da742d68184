# SPDX-License-Identifier: Apache-2.0
"""The thread that owns the device: jobs in, events out."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from jaxsparse.config.errors import UserError, require
from jaxsparse.inference.grammar import Guides
from jaxsparse.inference.jobs import (
  Draining,
  EngineDead,
  EngineStats,
  Job,
  Starting,
)
from jaxsparse.inference.mailbox import Mailbox
from jaxsparse.inference.masks import Masks
from jaxsparse.inference.served_adapters import Adapter
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.inference.turns import Deliver, Entry, Observe, Turns

State = Literal['starting', 'ready', 'draining', 'dead']

# Jobs that may wait for each slot: more would wait longer than clients do.
_QUEUE = 4

# For the thread to end in, after all else.
_LAST_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Engine:
  """Runs jobs in slots, each as if it were alone.

  One thread calls the programs. It gives the device a chunk of a prompt and a
  decode step, and reads what the step before has drawn while the device works.

  Args:
    build: makes the programs, in the engine's thread; is given a function for
      what it does meanwhile.
    tokenizer: of the model.
    max_queue: jobs that may wait; None for 4 for each slot.
    max_queue_tokens: of their prompts together; None for any number.
    prefix_bytes: of what has been read of prompts; 0 keeps none.
    root: what the state of a slot depends on, such as the checkpoint's step.
    observe: given a measure's name, value and label, in the engine's thread:
      'step_seconds' by program, 'batch_occupancy' in slots and
      'request_queue_time_seconds'.
  """

  def __init__(
    self,
    build: Callable[[Callable[[str], None]], Programs],
    tokenizer: Any,
    *,
    max_queue: int | None = None,
    max_queue_tokens: int | None = None,
    prefix_bytes: int = 0,
    root: str = '',
    observe: Observe = lambda *measure: None,
  ):
    self._build, self._tokenizer, self._observe = build, tokenizer, observe
    self._prefix_bytes, self._root = prefix_bytes, root
    self._mailbox = Mailbox(max_queue, max_queue_tokens)
    self._turns: Turns | None = None
    self._masks: Masks | None = None
    self._is_idle, self._beat = False, time.monotonic()
    self._thread = threading.Thread(
      target=self._run, name='engine', daemon=True
    )
    self._programs: Programs | None = None
    self.state: State = 'starting'
    self.stage = ''
    self.limit = 0
    self.failure: BaseException | None = None

  # What other threads call.

  def start(self) -> None:
    """Begins to compile, then to work."""
    self._thread.start()

  def submit(self, job: Job, deliver: Deliver) -> None:
    """Takes one job; see `submit_all`."""
    self.submit_all([job], deliver)

  def submit_all(self, jobs: Sequence[Job], deliver: Deliver) -> None:
    """Takes jobs, all or none of them.

    Args:
      jobs: with ids of their own.
      deliver: called in the engine's thread with all events of a step that are
        for jobs of this very callable. Must not block.

    Raises:
      UserError: a job can never run here.
      QueueFull: too much waits.
      Unavailable: the engine starts, drains or is dead.
    """
    self._check_available()
    for job in jobs:
      self._check_room(job)
    now = time.monotonic()
    entries = [Entry(job, deliver, now, self._tokenizer) for job in jobs]
    self._mailbox.put_jobs(jobs, [('add', entry) for entry in entries])

  def put_adapter(self, adapter: Adapter) -> Future[None]:
    """Reads an adapter anew for jobs that begin; the others keep theirs.

    Returns:
      What tells when it is there; its error is a `NoPlace` or a UserError.

    Raises:
      Unavailable: the engine starts, drains or is dead.
    """
    self._check_available()
    told: Future[None] = Future()
    self._mailbox.put('adapter', adapter, told)
    return told

  def cancel(self, job_id: str) -> None:
    """Ends a job wherever it is; does nothing where there is none."""
    self._mailbox.put('cancel', job_id)

  def drain(self, seconds: float) -> bool:
    """Finishes what runs, refuses all else, and ends the thread.

    Args:
      seconds: after which what still runs is cut off.

    Returns:
      Whether all that ran has come to its own end.
    """
    if self.state != 'dead':
      self.state = 'draining'
    self._mailbox.put('drain')
    is_done = self._mailbox.wait_for_end(seconds)
    self._mailbox.put('stop')
    if self._thread.is_alive():
      # A device that hangs must not keep the process.
      self._thread.join(_LAST_SECONDS)
    return is_done and self.failure is None

  def heartbeat_age(self) -> float:
    """Seconds since the engine has been seen at work; 0 while it has none."""
    return 0.0 if self._is_idle else time.monotonic() - self._beat

  def stats(self) -> EngineStats:
    """What it does now, and has done; zeros until it is ready."""
    programs, turns, mailbox = self._programs, self._turns, self._mailbox
    if turns is None:
      return EngineStats()
    scheduler, slots = turns.scheduler, programs.num_slots
    rows = sum(map(scheduler.num_rows, range(slots)))
    return EngineStats(
      running=len(scheduler.running),
      reading=len(scheduler.reading),
      waiting=mailbox.num_waiting,
      slots=slots,
      cache_rows_used_ratio=rows / (slots * programs.length),
      queue_tokens=mailbox.num_tokens,
      programs_compiled=programs.num_compiled,
      prefix_bytes=turns.store.num_bytes,
      rejected=dict(mailbox.rejected),
      finished=dict(turns.finished),
      cancelled=dict(turns.cancelled),
      steps=dict(turns.steps),
      **turns.counts,
    )

  def _check_available(self) -> None:
    if self.state == 'starting':
      raise Starting(f'the engine is starting: {self.stage or "a moment"}.')
    if self.state == 'draining':
      raise Draining('the engine finishes what runs and takes no more.')
    if self.state == 'dead':
      raise EngineDead('the engine has ended.')

  def _check_room(self, job: Job) -> None:
    num_prompt, places = len(job.tokens), self._programs.places
    require(
      job.picture is None or self._programs.sight is not None,
      'the model sees no pictures.',
    )
    require(
      not job.adapter or (places is not None and places.has(job.adapter)),
      f'there is no adapter {job.adapter!r} beside the model.',
    )
    require(num_prompt > 0, 'tokens must be at least one, got none.')
    require(
      num_prompt + job.max_tokens <= self.limit,
      f'max_tokens = {job.max_tokens:,} after {num_prompt:,} tokens of prompt '
      f'must be at most {self.limit:,} together.',
    )

  # The engine's thread.

  def _run(self) -> None:
    try:
      self._set_up()
      while self._take_mail():
        self._turns.turn(self._deliver)
    except BaseException as error:
      # What a user can mend is a sentence, which whoever started it shows.
      if not (self._turns is None and isinstance(error, UserError)):
        _log.exception('the engine has failed')
      self.failure = error
    self._end_all()

  def _set_up(self) -> None:
    self._programs = self._build(self._tell)
    if self._mailbox.max_waiting is None:
      self._mailbox.max_waiting = _QUEUE * self._programs.num_slots
    guides = Guides(self._tokenizer, self._programs.vocab_size)
    self._masks = Masks(
      guides, lambda *content: self._mailbox.put('mask', *content)
    )
    self._turns = Turns(
      self._programs,
      self._prefix_bytes,
      self._root,
      self._observe,
      self._mailbox.leave_queue,
      self._masks,
    )
    self.limit = self._programs.length
    if self.state == 'starting':
      self.state = 'ready'

  def _tell(self, stage: str) -> None:
    self.stage, self._beat = stage, time.monotonic()

  def _take_mail(self) -> bool:
    """Waits for something to do; False when the engine is to end."""
    if not self._turns.has_work:
      self._is_idle = True
      self._mailbox.wait(self._masks.seconds_left)
    self._beat, self._is_idle = time.monotonic(), False
    while message := self._mailbox.take():
      kind, *content = message
      if kind == 'stop':
        return False
      self._handle(kind, *content)
    self._turns.end_overdue()
    self._deliver()
    return True

  def _handle(self, kind: str, *content: Any) -> None:
    turns = self._turns
    if kind == 'add':
      turns.add(*content)
    elif kind == 'cancel':
      turns.cancel(*content)
    elif kind == 'mask':
      turns.take_mask(*content)
    elif kind == 'adapter':
      turns.put_adapter(*content)
    if self.state == 'draining':
      turns.end_waiting('draining')

  def _deliver(self) -> None:
    self._beat = time.monotonic()
    events = self._turns.take_events()
    for deliver, batch in events.items():
      try:
        deliver(batch)
      except Exception:
        # Whoever listened is gone, such as a loop that is closed; others stay.
        _log.exception('events could not be delivered')
        for event in batch:
          self.cancel(event.job_id)
    over = [e.job_id for batch in events.values() for e in batch if e.finish]
    if over:
      self._mailbox.end(over)

  def _end_all(self) -> None:
    """Tells all who are left that no more comes."""
    self.state = 'dead'
    left = self._mailbox.close()
    if self._turns is None:
      return
    for kind, *content in left:
      if kind == 'add':
        self._turns.add(*content)
    if self.failure is None:
      self._turns.end_all('abort', 'draining')
    else:
      error = f'the engine has failed: {self.failure!r}'
      self._turns.end_all('error', error)
    self._deliver()
    self._masks.close()
