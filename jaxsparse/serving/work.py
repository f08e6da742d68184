# SPDX-License-Identifier: Apache-2.0
"""The jobs of one request, from the engine's thread to the loop of HTTP."""

import asyncio
import collections
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jaxsparse.inference.jobs import Event, Job
from jaxsparse.serving import errors
from jaxsparse.serving.errors import ApiError
from jaxsparse.serving.metrics import Metrics

log = logging.getLogger('jaxsparse.serving')


class Delivery:
  """Hands the engine's events to the requests that wait for them.

  Called in the engine's thread with the events of a step; however many there
  are, the loop is woken once.
  """

  def __init__(self, loop: asyncio.AbstractEventLoop):
    self._loop = loop
    self._inbox: collections.deque[Event] = collections.deque()
    self._is_called = False
    self._queues: dict[str, asyncio.Queue[Event]] = {}

  def __call__(self, events: Sequence[Event]) -> None:
    self._inbox.extend(events)
    if self._is_called:
      return
    self._is_called = True
    try:
      self._loop.call_soon_threadsafe(self._hand_out)
    except RuntimeError:
      # The loop has ended: nobody waits any more.
      self._is_called = False

  def _hand_out(self) -> None:
    # First: what comes from now on calls again.
    self._is_called = False
    while self._inbox:
      event = self._inbox.popleft()
      if queue := self._queues.get(event.job_id):
        queue.put_nowait(event)

  def open(self, ids: Sequence[str]) -> asyncio.Queue[Event]:
    """A queue of the events of some jobs; tokens bound how long it gets."""
    queue: asyncio.Queue[Event] = asyncio.Queue()
    self._queues |= dict.fromkeys(ids, queue)
    return queue

  def close(self, ids: Sequence[str]) -> None:
    for i in ids:
      self._queues.pop(i, None)


class Work:
  """The jobs of one request: submitted, followed, measured, cancelled."""

  def __init__(
    self,
    engine: Any,
    delivery: Delivery,
    metrics: Metrics,
    jobs: Sequence[Job],
    arrival: float,
    seconds: float,
    on_text: Callable[[Job, str], None] = lambda job, text: None,
  ):
    """Makes the work; `start` submits it.

    Args:
      engine: that does it.
      delivery: through which events come back.
      metrics: that count it.
      jobs: one for each choice, in the order of choices.
      arrival: when the request came, of `time.monotonic`.
      seconds: after which what is left is cancelled.
      on_text: called with what a job has drawn when it ends.
    """
    self._engine, self._delivery, self._metrics = engine, delivery, metrics
    self._jobs = {job.id: job for job in jobs}
    self._arrival, self._seconds = arrival, seconds
    self._on_text = on_text
    self._left = set(self._jobs)
    self._drawn = dict.fromkeys(self._jobs, 0)
    self._last: dict[str, float] = {}
    self._first: dict[str, float] = {}
    self._queued = dict.fromkeys(self._jobs, 0.0)
    self._texts = {i: [] for i in self._jobs}

  def start(self) -> None:
    """Submits all jobs or none.

    Raises:
      ApiError: the engine does not take them.
    """
    self._queue = self._delivery.open(list(self._jobs))
    try:
      self._engine.submit_all(list(self._jobs.values()), self._delivery)
    except Exception as error:
      self._left.clear()
      self.close()
      raise errors.from_engine(error) from error

  async def events(self) -> AsyncIterator[Event]:
    """All events of all jobs, as they come.

    Raises:
      ApiError: a job did not come to its end, or the time is over.
    """
    deadline = asyncio.get_running_loop().time() + self._seconds
    while self._left:
      try:
        async with asyncio.timeout_at(deadline):
          event = await self._queue.get()
      except TimeoutError as error:
        raise ApiError(
          504,
          'time_limit',
          f'The request was ended after {self._seconds:g} s, which is as long '
          'as one may take here.',
        ) from error
      self._note(event)
      is_alive = self._engine.failure is None
      if failed := errors.of_event(event, is_alive):
        raise failed
      yield event

  def _note(self, event: Event) -> None:
    now, i = time.monotonic(), event.job_id
    self._queued[i] = max(self._queued[i], event.queue_seconds)
    if event.tokens:
      if i in self._first:
        gap = (now - self._last[i]) / len(event.tokens)
        self._metrics.inter_token.observe(gap)
      else:
        self._first[i] = now
        self._metrics.first_token.observe(now - self._arrival)
      self._last[i] = now
      self._drawn[i] += len(event.tokens)
    self._texts[i].append(event.text)
    if event.finish:
      self._left.discard(i)
      self._metrics.whole.observe(now - self._arrival)
      self._metrics.prompt_tokens.observe(len(self._jobs[i].tokens))
      self._metrics.drawn_tokens.observe(self._drawn[i])
      self._tell(i, event.finish)

  def _tell(self, i: str, finish: str) -> None:
    """One line of log: numbers, never what was written."""
    job = self._jobs[i]
    first = self._first.get(i)
    log.info(
      '%s prompt %d drawn %d seed %d queue %.3f s first %s total %.3f s '
      'finish %s',
      i,
      len(job.tokens),
      self._drawn[i],
      job.sampling.seed,
      self._queued[i],
      'none' if first is None else f'{first - self._arrival:.3f} s',
      time.monotonic() - self._arrival,
      finish,
    )
    self._on_text(job, ''.join(self._texts[i]))

  def close(self) -> None:
    """Cancels what has not ended. To be called however the request ends."""
    for i in self._left:
      self._engine.cancel(i)
      self._tell(i, 'client_closed')
    self._left.clear()
    self._delivery.close(list(self._jobs))
