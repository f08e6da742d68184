"""SIGTERM and SIGINT ask the loop to stop; a second one stops at once."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
  """Whether a signal has asked to stop, and which."""

  signal_name = ''

  def __bool__(self) -> bool:
    return bool(self.signal_name)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
  """Turns the first SIGTERM or SIGINT into a request that the loop reads."""
  request = StopRequest()
  signals = (signal.SIGTERM, signal.SIGINT)

  def handle(number, frame):
    request.signal_name = signal.Signals(number).name
    for s, handler in previous.items():
      signal.signal(s, handler)

  previous = {s: signal.signal(s, handle) for s in signals}
  try:
    yield request
  finally:
    for s, handler in previous.items():
      signal.signal(s, handler)
