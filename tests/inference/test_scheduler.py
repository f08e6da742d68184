# SPDX-License-Identifier: Apache-2.0
"""Slots and turns, without a device: a model beside it over long traces."""

import collections
import itertools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
  RuleBasedStateMachine,
  invariant,
  precondition,
  rule,
  run_state_machine_as_test,
)

from jaxsparse.inference.scheduler import Chunk, Scheduler, Task


class Model:
  """Plays the engine, and keeps its own books of what must be so."""

  def __init__(self, num_slots, chunk):
    self.scheduler = Scheduler(num_slots, chunk)
    self.num_slots, self.chunk = num_slots, chunk
    self.queue, self.tasks, self.slots = collections.deque(), {}, {}
    self.read, self.drawn, self.ended = {}, {}, collections.Counter()
    # Chunks of others since the oldest reader had one.
    self.passed = 0

  def add(self, task):
    self.scheduler.add(task)
    self.tasks[task.id] = task
    self.queue.append(task.id)

  def end(self, job_id):
    self.scheduler.remove(job_id)
    self.ended[job_id] += 1
    del self.tasks[job_id]
    if job_id in self.queue:
      self.queue.remove(job_id)
    for book in (self.slots, self.read, self.drawn):
      book.pop(job_id, None)

  def admit(self):
    num_free = self.num_slots - len(self.slots)
    for slot, job_id in self.scheduler.admit():
      # The oldest first, into a slot that nobody has.
      assert job_id == self.queue.popleft()
      assert slot not in self.slots.values()
      self.slots[job_id] = slot
      self.read[job_id] = self.drawn[job_id] = 0
      num_free -= 1
    # Nobody waits beside a free slot.
    assert not (num_free and self.queue)

  def step(self, skip=0):
    """One chunk and one decode step."""
    self.admit()
    readers = [x for x in self.slots if self.left(x)]
    slot = self.scheduler.next_reader()
    assert (slot is None) == (not readers)
    if readers:
      # Slots are in the order of admission: dicts keep theirs.
      oldest = readers[0]
      job_id = next(x for x in readers if self.slots[x] == slot)
      if skip and not self.read[job_id]:
        most = (self.tasks[job_id].num_prompt - 1) // self.chunk
        self.read[job_id] = min(skip, most) * self.chunk
        self.scheduler.skip(slot, self.read[job_id])
      if job_id == oldest:
        self.passed = 0
      else:
        self.passed += 1
        assert self.left(job_id) <= self.chunk < self.left(oldest)
      assert self.passed <= 1
      task, begin = self.tasks[job_id], self.read[job_id]
      end = min(begin + self.chunk, task.num_prompt)
      is_last = end == task.num_prompt
      assert self.scheduler.read(slot) == Chunk(slot, begin, end, is_last)
      self.read[job_id] = end
      if is_last and task.max_tokens:
        self.drawn[job_id] = 1
    expected = {
      self.slots[job_id]: job_id
      for job_id, num in self.drawn.items()
      if 0 < num < self.tasks[job_id].max_tokens
    }
    assert set(self.scheduler.draw()) == set(expected)
    for job_id in expected.values():
      self.drawn[job_id] += 1

  def end_finished(self):
    for job_id in list(self.tasks):
      is_read = job_id in self.slots and not self.left(job_id)
      if is_read and self.is_done(job_id):
        self.end(job_id)

  def is_done(self, job_id):
    return self.drawn[job_id] == self.tasks[job_id].max_tokens

  def left(self, job_id):
    return self.tasks[job_id].num_prompt - self.read[job_id]

  def check(self):
    s = self.scheduler
    sets = (s.free, s.running, s.reading)
    assert sum(map(len, sets)) == self.num_slots
    assert set().union(*sets) == set(range(self.num_slots))
    assert s.num_waiting == len(self.queue) == len(s.waiting_ids())
    assert s.is_empty == (not self.tasks)
    drawers = [
      x for x in self.slots if not self.left(x) and not self.is_done(x)
    ]
    can_admit = self.queue and len(self.slots) < self.num_slots
    assert s.has_work == bool(can_admit or s.reading or drawers)
    for job_id, task in self.tasks.items():
      if job_id in self.slots:
        assert s.place(job_id) == (
          'reading' if self.left(job_id) else 'running'
        )
        rows = self.read[job_id] + max(self.drawn[job_id] - 1, 0)
        assert s.num_rows(self.slots[job_id]) == rows
        # What was reserved is enough.
        assert rows < task.num_prompt + max(task.max_tokens, 1)
      else:
        assert s.place(job_id) == 'waiting'
    assert max(self.ended.values(), default=1) == 1


@pytest.mark.parametrize(('num_slots', 'chunk'), [(1, 4), (3, 8), (8, 16)])
def test_long_traces_keep_to_the_books(num_slots, chunk):
  rng = random.Random(num_slots)
  model, numbers = Model(num_slots, chunk), itertools.count()
  for step in range(33_400):
    # Floods and quiet times.
    rate = 0.15 * num_slots if step // 500 % 2 else 0.02
    while rng.random() < rate and len(model.tasks) < 4 * num_slots:
      long = rng.random() < 0.2
      num_prompt = rng.randint(1, 12 * chunk if long else chunk)
      task = Task(str(next(numbers)), num_prompt, rng.randint(0, 12))
      model.add(task)
    model.step(skip=rng.choice([0, 0, 1, 3]))
    if rng.random() < 0.05 and model.tasks:
      model.end(rng.choice(list(model.tasks)))
    model.end_finished()
    if step % 10 == 0:
      model.check()
  for _ in range(2000):
    model.step()
    model.end_finished()
  # All came to their end, nothing leaks.
  assert not model.tasks
  assert len(model.ended) == next(numbers) > 500
  model.check()


class _Traces(RuleBasedStateMachine):
  def __init__(self):
    super().__init__()
    self.model, self.numbers = Model(3, 4), itertools.count()

  @rule(num_prompt=st.integers(1, 20), max_tokens=st.integers(0, 4))
  def add(self, num_prompt, max_tokens):
    self.model.add(Task(str(next(self.numbers)), num_prompt, max_tokens))

  @rule(skip=st.integers(0, 3))
  def step(self, skip):
    self.model.step(skip)

  @rule()
  def end_finished(self):
    self.model.end_finished()

  @precondition(lambda self: self.model.tasks)
  @rule(data=st.data())
  def cancel(self, data):
    self.model.end(data.draw(st.sampled_from(sorted(self.model.tasks))))

  @invariant()
  def books(self):
    self.model.check()


def test_any_trace_keeps_to_the_books():
  run_state_machine_as_test(
    _Traces,
    settings=settings(
      max_examples=40, stateful_step_count=40, deadline=None, database=None
    ),
  )


def test_a_long_prompt_is_read_however_many_short_ones_come():
  scheduler, num_passed = Scheduler(2, 4), 0
  scheduler.add(Task('long', 400, 1))
  for _ in range(1000):
    if not scheduler.place(f'short {num_passed}'):
      scheduler.add(Task(f'short {num_passed}', 2, 1))
    scheduler.admit()
    chunk = scheduler.read(scheduler.next_reader())
    if chunk.slot == 1:
      scheduler.remove(f'short {num_passed}')
      num_passed += 1
    elif chunk.is_last:
      break
  # One between each two chunks of the long one.
  assert num_passed == 99


def test_a_stepwise_job_draws_only_what_has_been_released():
  scheduler = Scheduler(2, 4)
  scheduler.add(Task('held', 5, 9, is_stepwise=True))
  scheduler.add(Task('free', 1, 9))
  scheduler.admit()
  # The last chunk draws.
  assert [scheduler.read(scheduler.next_reader()).slot for _ in '12'] == [1, 0]
  assert scheduler.next_reader() is None
  assert [scheduler.draw() for _ in '12'] == [(1,), (1,)]
  scheduler.release('held')
  assert scheduler.read(scheduler.next_reader()).is_last
  assert [scheduler.draw() for _ in '12'] == [(1,), (1,)]
  scheduler.release('held')
  assert [scheduler.draw() for _ in '12'] == [(0, 1), (1,)]
  scheduler.remove('free')
  assert not scheduler.has_work
  scheduler.release('held')
  assert scheduler.has_work
