# SPDX-License-Identifier: Apache-2.0
"""How other threads reach the engine: messages, and a bounded queue of jobs."""

import collections
import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jaxsparse.config.errors import require
from jaxsparse.inference.jobs import EngineDead, Job, QueueFull

# Ended jobs by which the rate is measured at which the queue moves.
_RECENT = 32

# Seconds after which whoever was refused may come back, at most.
_LONGEST_WAIT = 120


class Mailbox:
  """Messages in the order in which they came, and books of the jobs in them.

  Every method may be called in any thread.

  Args:
    max_waiting: jobs that may wait for a slot; None for no bound.
    max_tokens: of their prompts together; None for no bound.
  """

  def __init__(self, max_waiting: int | None, max_tokens: int | None):
    self.max_waiting, self.max_tokens = max_waiting, max_tokens
    self.num_waiting = self.num_tokens = 0
    # By which bound.
    self.rejected = dict(requests=0, tokens=0)
    self._messages: collections.deque[tuple] = collections.deque()
    self._ids: set[str] = set()
    self._ended_at: collections.deque[float] = collections.deque(maxlen=_RECENT)
    self._is_closed = False
    self._condition = threading.Condition()

  def put(self, *message: Any) -> None:
    """Puts a message, which nobody reads any more once it is closed."""
    with self._condition:
      if not self._is_closed:
        self._messages.append(message)
        self._condition.notify_all()

  def put_jobs(self, jobs: Sequence[Job], messages: Iterable[tuple]) -> None:
    """Puts jobs, which wait from now on, all or none of them.

    Raises:
      UserError: they are more than may ever wait.
      QueueFull: they are more than may wait now.
      EngineDead: the mailbox is closed.
    """
    num_tokens = sum(len(job.tokens) for job in jobs)
    with self._condition:
      if self._is_closed:
        raise EngineDead('the engine has ended.')
      self._check(len(jobs), num_tokens)
      for job in jobs:
        if job.id in self._ids:
          raise ValueError(f'there is a job {job.id} already')
        self._ids.add(job.id)
      self.num_waiting += len(jobs)
      self.num_tokens += num_tokens
      self._messages.extend(messages)
      self._condition.notify_all()

  def wait(self, seconds: float | None = None) -> None:
    """Until there is a message, at most so long."""
    with self._condition:
      self._condition.wait_for(lambda: self._messages, seconds)

  def take(self) -> tuple | None:
    """The oldest message, None if there is none."""
    with self._condition:
      return self._messages.popleft() if self._messages else None

  def close(self) -> list[tuple]:
    """Takes no more; returns what has not been read."""
    with self._condition:
      self._is_closed = True
      left, self._messages = list(self._messages), collections.deque()
      return left

  def leave_queue(self, job: Job) -> None:
    """A job does not wait any more."""
    with self._condition:
      self.num_waiting -= 1
      self.num_tokens -= len(job.tokens)

  def end(self, job_ids: Iterable[str]) -> None:
    """Jobs are over, and have been told so: their ids may come again."""
    with self._condition:
      for job_id in job_ids:
        self._ids.discard(job_id)
        self._ended_at.append(time.monotonic())
      self._condition.notify_all()

  def wait_for_end(self, seconds: float) -> bool:
    """Whether all jobs are over within a time."""
    with self._condition:
      return self._condition.wait_for(lambda: not self._ids, seconds)

  def _check(self, num_jobs: int, num_tokens: int) -> None:
    most, which = self.max_waiting, None
    if most is not None:
      require(
        num_jobs <= most, f'{num_jobs} texts at once must be at most {most}.'
      )
      if self.num_waiting + num_jobs > most:
        which = 'requests'
    # What alone is too much may come when nothing else waits.
    if self.num_tokens and self.max_tokens is not None:
      is_too_long = self.num_tokens + num_tokens > self.max_tokens
      which = which or ('tokens' if is_too_long else None)
    if which:
      self.rejected[which] += 1
      raise QueueFull(
        f'{self.num_waiting} texts after {self.num_tokens:,} tokens of prompt '
        'wait already: try again later.',
        self._seconds_to_move(),
      )

  def _seconds_to_move(self) -> int:
    """Until as many jobs have ended as wait now, at the rate of the last."""
    ended = list(self._ended_at)
    if len(ended) < 2:
      return 1
    each = (ended[-1] - ended[0]) / (len(ended) - 1)
    return max(1, min(math.ceil(self.num_waiting * each), _LONGEST_WAIT))
