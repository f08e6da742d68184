# SPDX-License-Identifier: Apache-2.0
"""Says now and then how much of something long is done."""

import time
from collections.abc import Callable

SECONDS = 5.0


class Percent:
  """Lines such as 'Hashing the text: 35%', none where it takes a moment."""

  def __init__(self, doing: str, total: int, say: Callable[[str], None]):
    self._doing = doing
    self._total = max(total, 1)
    self._say = say
    self._last = time.monotonic()

  def reach(self, done: int) -> None:
    """Takes the progress so far, in the units of the total."""
    now = time.monotonic()
    if now - self._last >= SECONDS:
      self._last = now
      self._say(f'{self._doing}: {min(done / self._total, 1):.0%}')
