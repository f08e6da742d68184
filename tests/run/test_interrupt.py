# SPDX-License-Identifier: Apache-2.0
"""Which signals ask to stop, and how soon several processes heed one."""

import os
import signal

import pytest

from jaxsparse.config import TrainConfig
from jaxsparse.config.errors import UserError
from jaxsparse.run import interrupt
from jaxsparse.run.interrupt import Agreement, StopRequest, stop_on_signals


def send(name):
  os.kill(os.getpid(), signal.Signals[name])


@pytest.fixture
def calls():
  """Names of the signals that came through to handlers of before."""
  seen = []

  def handle(number, frame):
    seen.append(signal.Signals(number).name)

  before = {
    signal.Signals[name]: signal.signal(signal.Signals[name], handle)
    for name in TrainConfig().stop_signals
  }
  yield seen
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('name', TrainConfig().stop_signals)
def test_each_signal_is_a_request(calls, name):
  with stop_on_signals() as stop:
    assert not stop
    send(name)
    assert stop
    assert stop.signal_name == name
  assert calls == []
  send(name)
  assert calls == [name]


def test_the_same_signal_again_is_what_it_was_before(calls):
  with stop_on_signals() as stop:
    send('SIGUSR1')
    # A job's warning, and the end of its time while all is being saved.
    send('SIGTERM')
    assert calls == []
    assert stop.signal_name == 'SIGUSR1'
    send('SIGTERM')
    assert calls == ['SIGTERM']


def test_a_terminal_that_closes_twice_is_one_request(calls):
  with stop_on_signals() as stop:
    send('SIGHUP')
    send('SIGHUP')
    assert stop.signal_name == 'SIGHUP'
  assert calls == []


def test_nohup_is_respected():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop_on_signals() as stop:
      send('SIGHUP')
      assert not stop
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_signals_are_chosen(calls):
  with stop_on_signals(('SIGUSR2',)) as stop:
    send('SIGTERM')
    assert calls == ['SIGTERM']
    assert not stop
    send('SIGUSR2')
    assert stop


@pytest.mark.parametrize('name', ['SIGFOO', 'SIGKILL', 'USR1', ''])
def test_what_is_no_request_is_refused(name):
  with pytest.raises(UserError, match=r'stop_signals must be of .*got'):
    TrainConfig(stop_signals=(name,))


class Others:
  """Stands for the clock and for the processes beside this one."""

  def __init__(self, monkeypatch, slowdown=1.0):
    self.now, self.asked, self.signal_name = 0.0, [], ''
    self._slowdown = slowdown
    monkeypatch.setattr(interrupt.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(interrupt.hosts, 'gather', self._gather)
    monkeypatch.setattr(interrupt.time, 'perf_counter', lambda: self.now)

  def _gather(self, value):
    self.asked.append(self.now)
    name, seconds = value
    return [[name, seconds], [self.signal_name, self._slowdown * seconds]]


@pytest.mark.parametrize('seconds', [0.01, 0.3, 2.0, 60.0])
def test_several_processes_ask_often_enough_and_no_oftener(
  monkeypatch, seconds
):
  others = Others(monkeypatch)
  agreement = Agreement(StopRequest())
  others.now += 40.0  # The first step compiles.
  assert not agreement()
  for _ in range(int(200 / seconds) + 20):
    others.now += seconds
    assert not agreement()
  gaps = [b - a for a, b in zip(others.asked, others.asked[1:], strict=False)]
  assert max(gaps) <= max(5.0, seconds) + 1e-6
  # Once the stride has grown.
  assert min(gaps[-5:]) >= min(5.0, 50 * seconds, max(seconds, 2.5)) - 1e-6


def test_steps_that_become_slow_are_asked_about_soon(monkeypatch):
  others = Others(monkeypatch)
  agreement = Agreement(StopRequest())
  for _ in range(2000):
    others.now += 0.01
    agreement()
  before = len(others.asked)
  for _ in range(60):
    others.now += 10.0
    agreement()
  # Fifty steps at most, and from then on every one.
  assert len(others.asked) - before >= 10


def test_a_signal_anywhere_stops_all_at_once(monkeypatch):
  others = Others(monkeypatch)
  request = StopRequest()
  agreement = Agreement(request)
  assert not agreement()
  others.signal_name = 'SIGUSR1'
  while not agreement():
    others.now += 0.1
  assert request.signal_name == 'SIGUSR1'


def test_a_signal_here_waits_for_the_others(monkeypatch):
  others = Others(monkeypatch)
  request = StopRequest()
  agreement = Agreement(request)
  for _ in range(100):
    others.now += 0.1
    agreement()
  request.signal_name = 'SIGTERM'
  num_asked = len(others.asked)
  answers = []
  while not any(answers):
    others.now += 0.1
    answers.append(agreement())
    assert answers[-1] == (len(others.asked) > num_asked)
  assert len(answers) * 0.1 <= 5.0


def test_a_signal_that_comes_while_all_ask_is_kept_for_the_next_time(
  monkeypatch,
):
  """To ask takes seconds where its program is compiled first."""
  others = Others(monkeypatch)
  request = StopRequest()
  ask = others._gather

  def gather(value):
    answers = ask(value)
    request.signal_name = 'SIGTERM'
    return answers

  monkeypatch.setattr(interrupt.hosts, 'gather', gather)
  agreement = Agreement(request)
  # The others were not told.
  assert not agreement()
  assert request.signal_name == 'SIGTERM'
  while not agreement():
    assert len(others.asked) < 2
  assert len(others.asked) == 2


def test_a_single_process_asks_nobody():
  request = StopRequest()
  agreement = Agreement(request)
  assert not agreement()
  request.signal_name = 'SIGTERM'
  assert agreement()
