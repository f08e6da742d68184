# SPDX-License-Identifier: Apache-2.0
"""Whom an engine tells what becomes of jobs."""

import collections
import threading


class Told:
  """What jobs have been told; waits for their ends."""

  def __init__(self):
    self.events = collections.defaultdict(list)
    self.batches = []
    self._changed = threading.Condition()

  def __call__(self, events):
    with self._changed:
      self.batches.append(events)
      for event in events:
        # Nothing comes after an end.
        assert not self.finish(event.job_id)
        self.events[event.job_id].append(event)
      self._changed.notify_all()

  def finish(self, job_id):
    events = self.events[job_id]
    return events[-1].finish if events else None

  def wait(self, job_id, has=lambda events: events[-1].finish):
    with self._changed:
      assert self._changed.wait_for(
        lambda: self.events[job_id] and has(self.events[job_id]), 60
      )
    return self.events[job_id]

  def tokens(self, job_id):
    return tuple(t for e in self.wait(job_id) for t in e.tokens)

  def text(self, job_id):
    return ''.join(e.text for e in self.wait(job_id))

  def logprobs(self, job_id):
    return [x for e in self.wait(job_id) for x in e.logprobs or ()]
