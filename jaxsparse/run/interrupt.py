# SPDX-License-Identifier: Apache-2.0
"""Signals ask the loop to save and stop; the same one again ends it at once."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence

import jax

from jaxsparse.config import TrainConfig
from jaxsparse.run import hosts

# Between a signal and the step or batch at which several processes heed it.
_SECONDS = 5.0
# Most steps between, which may become slow all of a sudden; a fiftieth of a
# round trip is nothing to a step.
_MOST_POINTS = 50


class StopRequest:
  """Whether a signal has asked to stop, and which."""

  signal_name = ''

  def __bool__(self) -> bool:
    return bool(self.signal_name)


@contextlib.contextmanager
def stop_on_signals(
  names: Sequence[str] = TrainConfig.stop_signals,
) -> Iterator[StopRequest]:
  """Turns the first of the signals into a request that the loop reads.

  A second one of another name changes nothing: a job's warning is followed by
  SIGTERM, perhaps before all is saved. SIGHUP stays ignored where `nohup` has
  it so, and never ends the process, as a terminal may send it twice.
  """
  request = StopRequest()

  def handle(number, frame):
    name = signal.Signals(number).name
    request.signal_name = request.signal_name or name
    if name != 'SIGHUP':
      signal.signal(number, previous[number])

  previous = {}
  for name in names:
    number = signal.Signals[name]
    is_unwanted = signal.getsignal(number) == signal.SIG_IGN
    if not (name == 'SIGHUP' and is_unwanted):
      previous[number] = signal.signal(number, handle)
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


class Agreement:
  """Whether all processes stop, which each asks at the same points.

  To ask the others takes a round trip, so they do it every few points, such
  that about five seconds pass between.
  """

  def __init__(self, request: StopRequest):
    self._request = request
    self._stride = self._points_left = 1
    self._start = time.perf_counter()

  def __call__(self) -> bool:
    """The same answer in all processes; every one of them must call it."""
    if jax.process_count() == 1:
      return bool(self._request)
    self._points_left -= 1
    if self._points_left:
      return False
    seconds = (time.perf_counter() - self._start) / self._stride
    answers = hosts.gather([self._request.signal_name, seconds])
    names, seconds = zip(*answers, strict=True)
    # The first point takes long, as it compiles.
    fitting = max(1, int(_SECONDS / max(*seconds, 1e-6)))
    self._stride = self._points_left = min(
      2 * self._stride, fitting, _MOST_POINTS
    )
    self._start = time.perf_counter()
    name = next(filter(None, names), '')
    if name:
      # Else there may be a request that came since: the others have not heard.
      self._request.signal_name = name
    return bool(name)
