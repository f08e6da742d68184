# SPDX-License-Identifier: Apache-2.0
"""What processes agree on, with threads that stand for them."""

import threading

import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.run import hosts


class Together:
  """Runs a function in threads, each of which is a process to `hosts`."""

  def __init__(self, monkeypatch, num):
    self._local = threading.local()
    self._barrier = threading.Barrier(num, timeout=5)
    self._values = [None] * num
    monkeypatch.setattr(hosts.jax, 'process_count', lambda: num)
    monkeypatch.setattr(hosts.jax, 'process_index', lambda: self.index)
    monkeypatch.setattr(hosts, 'gather', self._gather)

  @property
  def index(self):
    return self._local.index

  def _gather(self, value):
    self._values[self.index] = value
    self._barrier.wait()
    values = list(self._values)
    self._barrier.wait()
    return values

  def run(self, function):
    """What `function(index)` returned or raised in each thread."""
    ends = [None] * len(self._values)

    def one(index):
      self._local.index = index
      try:
        ends[index] = function(index)
      except Exception as error:
        ends[index] = error

    threads = [
      threading.Thread(target=one, args=(i,)) for i in range(len(ends))
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return ends


@pytest.fixture
def three(monkeypatch):
  return Together(monkeypatch, 3)


def test_the_lead_is_first_and_all_are_through_together(three):
  order = []

  def run(index):
    with hosts.process_zero_first():
      order.append(index)
    return len(order)

  assert three.run(run) == [3, 3, 3]
  assert order[0] == 0


@pytest.mark.parametrize('failing', [0, 2])
def test_all_end_with_the_sentence_of_the_one_that_fails(three, failing):
  begun = []

  def run(index):
    with hosts.process_zero_first():
      begun.append(index)
      if index == failing:
        raise UserError('no room.')

  ends = three.run(run)
  assert str(ends[failing]) == 'no room.'
  for index in {0, 1, 2} - {failing}:
    assert isinstance(ends[index], UserError)
    assert str(ends[index]) == f'process {failing} of 3: no room.'
  assert failing != 0 or begun == [0]


def test_a_defect_of_one_process_ends_the_others_with_its_name(three):
  def run(index):
    with hosts.process_zero_first():
      if index == 1:
        raise KeyError('x')

  ends = three.run(run)
  assert isinstance(ends[1], KeyError)
  assert str(ends[0]) == str(ends[2]) == "process 1 of 3: KeyError: 'x'"


def test_what_is_gathered_of_many_lengths_takes_few_programs(monkeypatch):
  """Each length of the array would compile another."""
  sizes = set()

  def allgather(x):
    sizes.add((x.shape, x.dtype))
    return np.stack([x, x])

  monkeypatch.setattr(hosts.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(hosts.multihost_utils, 'process_allgather', allgather)
  for length in [0, 1, 2, 3, *range(100, 200, 7), 1000]:
    value = ['', 'x' * length, 0.1]
    assert hosts.gather(value) == [value, value]
  assert len(sizes) <= 5
