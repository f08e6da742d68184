# SPDX-License-Identifier: Apache-2.0
"""An engine without a model: a thread that repeats what it was given."""

import codecs
import collections
import itertools
import threading
import time

from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.inference.jobs import (
  Draining,
  EngineDead,
  EngineStats,
  Event,
  QueueFull,
  Starting,
  TokenLogprob,
)

BOUNDARY = ByteTokenizer.boundary_id
VOCAB = ByteTokenizer.vocab_size


class _Running:
  """A job in a slot."""

  def __init__(self, job, deliver):
    self.job, self.deliver = job, deliver
    self.drawn, self.length, self.held = 0, 0, ''
    self.decoder = codecs.getincrementaldecoder('utf-8')('replace')


class FakeEngine:
  """What the server sees of an engine.

  A job's token k is that of its prompt at k plus its seed, if it has a
  temperature.
  """

  def __init__(
    self,
    *,
    slots=4,
    limit=256,
    delay=0.0,
    max_queue=16,
    max_queue_tokens=10_000,
    eos_after=None,
    draw=None,
    state='ready',
  ):
    self.slots, self.limit, self.delay = slots, limit, delay
    self.max_queue, self.max_queue_tokens = max_queue, max_queue_tokens
    self.eos_after, self.state, self.stage = eos_after, state, ''
    self.draw = draw or self._repeat
    self.failure = None
    # To be set by tests: an exception that the next step raises.
    self.fault = None
    self.steps = 0
    self.finished = collections.Counter()
    self.cancelled = collections.Counter()
    self.tokens = collections.Counter()
    self.seen = []
    self._lock = threading.Condition()
    self._waiting, self._running = [], []
    self._doomed = set()
    self._beat = time.monotonic()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def start(self):
    self._thread.start()

  def submit_all(self, jobs, deliver):
    with self._lock:
      if self.state != 'ready':
        kinds = {'draining': Draining, 'dead': EngineDead}
        raise kinds.get(self.state, Starting)(f'The engine is {self.state}.')
      tokens = sum(len(w.job.tokens) for w in self._waiting)
      tokens += sum(len(job.tokens) for job in jobs)
      room = self.slots - len(self._running) + self.max_queue
      if (
        len(self._waiting) + len(jobs) > room or tokens > self.max_queue_tokens
      ):
        raise QueueFull('Too many requests wait.', 1)
      self._waiting += [_Running(job, deliver) for job in jobs]
      self.seen += jobs
      self._lock.notify()

  def cancel(self, job_id):
    with self._lock:
      self._doomed.add(job_id)
      self._lock.notify()

  def drain(self, seconds):
    with self._lock:
      self.state = 'draining'
      queued, self._waiting = self._waiting, []
      self._lock.notify()
      for one in queued:
        one.deliver(
          [Event(job_id=one.job.id, finish='abort', error='draining')]
        )
    end = time.monotonic() + seconds
    while self._running and time.monotonic() < end:
      time.sleep(0.01)
    return not self._running

  def heartbeat_age(self):
    return time.monotonic() - self._beat

  def stats(self):
    with self._lock:
      return EngineStats(
        running=len(self._running),
        waiting=len(self._waiting),
        reading=0,
        slots=self.slots,
        cache_rows_used_ratio=len(self._running) / self.slots,
        queue_tokens=sum(len(w.job.tokens) for w in self._waiting),
        programs_compiled=3,
        prefix_bytes=0,
        prompt_tokens=self.tokens['prompt'],
        generation_tokens=self.tokens['drawn'],
        wasted_tokens=0,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
        finished=dict(self.finished),
        rejected={},
        cancelled=dict(self.cancelled),
        steps={'plain': self.steps},
      )

  def _run(self):
    while self._running or self.state != 'draining':
      self._beat = time.monotonic()
      if self._running:
        time.sleep(self.delay)
      with self._lock:
        if not (self._running or self._waiting or self._doomed):
          # A fault comes without a notice. Threads that look more often, each
          # of its test's engine, would take a core from all later tests.
          self._lock.wait(0.02)
        self._step()

  def _step(self):
    if self.fault:
      self.state, self.failure = 'dead', self.fault
      self._end_all('error', 'the engine failed')
      self.fault = None
      return
    for one in [*self._running, *self._waiting]:
      if one.job.id in self._doomed:
        self.cancelled['running' if one in self._running else 'waiting'] += 1
        self._end(one, 'abort', error='cancelled')
    self._doomed.clear()
    while self._waiting and len(self._running) < self.slots:
      one = self._waiting.pop(0)
      self._running.append(one)
      self.tokens['prompt'] += len(one.job.tokens)
    if self._running:
      self.steps += 1
    for one in [*self._running]:
      self._draw(one)

  def _end_all(self, finish, error):
    for one in [*self._running, *self._waiting]:
      self._end(one, finish, error=error)

  def _end(self, one, finish, **event):
    for jobs in (self._running, self._waiting):
      if one in jobs:
        jobs.remove(one)
    self.finished[finish] += 1
    one.deliver([Event(job_id=one.job.id, finish=finish, **event)])

  def _repeat(self, job, number):
    letters = [t for t in job.tokens if t != BOUNDARY] or [ord('a')]
    shift = job.sampling.seed if job.sampling.temperature else 0
    if number == self.eos_after and not job.sampling.ignore_eos:
      return BOUNDARY
    return letters[(number + shift) % len(letters)]

  def _draw(self, one):
    job = one.job
    event = {}
    if one.drawn == 0 and job.wants_prompt_logprobs:
      event['prompt_logprobs'] = tuple(
        self._logprob(job, token, i - 1) if i else TokenLogprob(token, None)
        for i, token in enumerate(job.tokens)
      )
    if job.max_tokens == 0:
      self._end(one, 'length', **event)
      return
    token = self.draw(job, one.drawn)
    offset, finish, reason = one.length + len(one.held), None, None
    is_end = token == BOUNDARY and not job.sampling.ignore_eos
    if is_end or token in job.stop_token_ids:
      finish, reason = 'stop', None if is_end else token
    else:
      content = ByteTokenizer().decode_bytes([token])
      one.held += one.decoder.decode(content)
    one.drawn += 1
    self.tokens['drawn'] += 1
    text, found = self._certain(one)
    if found is not None:
      finish, reason = 'stop', found
    elif one.drawn == job.max_tokens:
      finish = finish or 'length'
    if finish and found is None:
      text += one.held + one.decoder.decode(b'', final=True)
    if job.num_logprobs is not None:
      event['logprobs'] = (self._logprob(job, token, one.drawn - 1),)
    event |= dict(text=text, tokens=(token,), offsets=(offset,))
    one.length += len(text)
    if finish:
      self._end(one, finish, stop_reason=reason, **event)
    else:
      one.deliver([Event(job_id=job.id, **event)])

  def _certain(self, one):
    """The text that no stop string can take back, and the stop found."""
    stops = [s for s in one.job.stop if s in one.held]
    if stops:
      stop = min(stops, key=one.held.index)
      end = one.held.index(stop) + len(stop) * one.job.include_stop
      return one.held[:end], stop
    kept = max(
      (
        n
        for stop in one.job.stop
        for n in range(1, len(stop))
        if one.held.endswith(stop[:n])
      ),
      default=0,
    )
    cut = len(one.held) - kept
    text, one.held = one.held[:cut], one.held[cut:]
    return text, None

  def _logprob(self, job, token, number):
    first = -(number % 8 + 1) / 8
    ids = itertools.islice(itertools.count(token), job.num_logprobs)
    top = tuple((i % VOCAB, first - (i - token)) for i in ids)
    return TokenLogprob(token, first, top)
