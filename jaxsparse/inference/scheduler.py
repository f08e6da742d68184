# SPDX-License-Identifier: Apache-2.0
"""Which job has which slot, and what the device does next; host alone.

A slot is taken for a whole job, as long as it may become: nothing that runs is
ever set aside. Prompts are read in chunks that begin at multiples of the chunk
from the first token, one for each decode step, so that a long one holds up the
others by no more than a chunk.
"""

import collections
import dataclasses
from typing import Literal

Place = Literal['waiting', 'reading', 'running']


@dataclasses.dataclass(frozen=True)
class Task:
  """As much of a job as decides when it runs."""

  id: str
  # Tokens of the prompt, at least one.
  num_prompt: int
  # To draw, at most.
  max_tokens: int
  # Whether it has to be released before each token is drawn.
  is_stepwise: bool = False


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Tokens `begin` to `end` of the prompt of a slot's job."""

  slot: int
  begin: int
  end: int
  is_last: bool


@dataclasses.dataclass
class _Tenant:
  task: Task
  # Of its admission: the smallest is the oldest.
  number: int
  # Tokens of the prompt that have been given to the device, or copied.
  num_read: int = 0
  # Tokens whose drawing has been given to the device.
  num_drawn: int = 0

  @property
  def num_left(self) -> int:
    return self.task.num_prompt - self.num_read


class Scheduler:
  """A queue, slots, and the order in which they get the device.

  The oldest job is admitted first and read first. A prompt of which one chunk
  is left may pass a longer one, which gets every other chunk all the same.

  Args:
    num_slots: jobs at once.
    chunk: tokens of a prompt that are read at once.
  """

  def __init__(self, num_slots: int, chunk: int):
    self._chunk = chunk
    self._waiting: collections.OrderedDict[str, Task] = (
      collections.OrderedDict()
    )
    self._tenants: list[_Tenant | None] = [None] * num_slots
    self._slots: dict[str, int] = {}
    # Stepwise jobs that may not draw.
    self._held: set[str] = set()
    self._num_admitted = 0
    self._has_passed = False

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  @property
  def reading(self) -> tuple[int, ...]:
    """Slots whose prompt is not read to its end."""
    return tuple(slot for slot, x in self._taken() if x.num_left)

  @property
  def running(self) -> tuple[int, ...]:
    """Slots whose prompt is read, also if their last token is on its way."""
    return tuple(slot for slot, x in self._taken() if not x.num_left)

  @property
  def free(self) -> tuple[int, ...]:
    return tuple(slot for slot, x in enumerate(self._tenants) if x is None)

  @property
  def is_empty(self) -> bool:
    return not (self._waiting or self._slots)

  @property
  def has_work(self) -> bool:
    """Whether there is something to admit, to read or to draw."""
    if self._waiting and self.free:
      return True
    return self.next_reader() is not None or bool(self.drawers())

  def tenant(self, slot: int) -> str:
    """The job that has a slot."""
    return self._tenants[slot].task.id

  def num_rows(self, slot: int) -> int:
    """Tokens that the slot's job has fed to the device."""
    tenant = self._tenants[slot]
    # The last token that is drawn has not been fed.
    return tenant.num_read + max(tenant.num_drawn - 1, 0) if tenant else 0

  def place(self, job_id: str) -> Place | None:
    """Where a job is, None if nowhere."""
    if job_id in self._waiting:
      return 'waiting'
    if job_id not in self._slots:
      return None
    tenant = self._tenants[self._slots[job_id]]
    return 'reading' if tenant.num_left else 'running'

  def waiting_ids(self) -> tuple[str, ...]:
    return tuple(self._waiting)

  def add(self, task: Task) -> None:
    """Puts a job at the end of the queue; its id is new."""
    self._waiting[task.id] = task
    if task.is_stepwise:
      self._held.add(task.id)

  def remove(self, job_id: str) -> None:
    """Ends a job wherever it is; its slot is free at once."""
    self._held.discard(job_id)
    if self._waiting.pop(job_id, None) is None:
      self._tenants[self._slots.pop(job_id)] = None

  def admit(self) -> list[tuple[int, str]]:
    """Gives free slots to those that have waited longest: slots and ids."""
    admitted = []
    for slot in self.free:
      if not self._waiting:
        break
      job_id, task = self._waiting.popitem(last=False)
      self._tenants[slot] = _Tenant(task, self._num_admitted)
      self._slots[job_id] = slot
      self._num_admitted += 1
      admitted.append((slot, job_id))
    return admitted

  def next_reader(self) -> int | None:
    """The slot of whose prompt a chunk is read next, None if there is none."""
    readers = sorted(
      (tenant.number, slot)
      for slot, tenant in self._taken()
      if tenant.num_left
      and not (self._is_held(tenant) and self._is_short(slot))
    )
    if not readers:
      return None
    oldest, *others = (slot for _, slot in readers)
    if self._has_passed or self._is_short(oldest):
      return oldest
    return next(filter(self._is_short, others), oldest)

  def skip(self, slot: int, num_tokens: int) -> None:
    """Takes the first tokens of a prompt, whole chunks of it, as read."""
    self._tenants[slot].num_read = num_tokens

  def read(self, slot: int) -> Chunk:
    """The next chunk of a slot's prompt, which the device is given now."""
    readers = [x.number for _, x in self._taken() if x.num_left]
    tenant = self._tenants[slot]
    self._has_passed = tenant.number > min(readers)
    begin = tenant.num_read
    tenant.num_read = min(begin + self._chunk, tenant.task.num_prompt)
    is_last = not tenant.num_left
    if is_last and tenant.task.max_tokens:
      self._draw(tenant)
    return Chunk(slot, begin, tenant.num_read, is_last)

  def drawers(self) -> tuple[int, ...]:
    """Slots that can draw another token now."""
    return tuple(
      slot
      for slot, tenant in self._taken()
      if not (tenant.num_left or self._is_held(tenant))
      and tenant.num_drawn < tenant.task.max_tokens
    )

  def draw(self) -> tuple[int, ...]:
    """The slots of the decode step that the device is given now."""
    slots = self.drawers()
    for slot in slots:
      self._draw(self._tenants[slot])
    return slots

  def release(self, job_id: str) -> None:
    """Lets a stepwise job draw one token."""
    self._held.discard(job_id)

  def _draw(self, tenant: _Tenant) -> None:
    tenant.num_drawn += 1
    if tenant.task.is_stepwise:
      self._held.add(tenant.task.id)

  def _is_held(self, tenant: _Tenant) -> bool:
    return tenant.task.id in self._held

  def _is_short(self, slot: int) -> bool:
    return self._tenants[slot].num_left <= self._chunk

  def _taken(self):
    return [(i, x) for i, x in enumerate(self._tenants) if x is not None]
