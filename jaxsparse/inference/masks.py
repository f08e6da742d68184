# SPDX-License-Identifier: Apache-2.0
"""Masks of grammars, made by threads beside the engine's, in bounded time."""

import concurrent.futures
import time
from collections.abc import Callable, Hashable
from typing import Any

from jaxsparse.config.errors import UserError
from jaxsparse.inference.grammar import Grammar, Guide, Guides

_NUM_THREADS = 2

# For a mask, or for the first one with the grammar itself.
MOST_SECONDS = 5.0


class Masks:
  """Steps of guides on their way; all methods are for the engine's thread.

  Args:
    guides: of the model.
    put: called in any thread with whose mask there is, the guide or None, and
      why there is none.
  """

  def __init__(
    self,
    guides: Guides,
    put: Callable[[Hashable, Guide | None, str], Any],
  ):
    self._guides, self._put = guides, put
    self._pool = concurrent.futures.ThreadPoolExecutor(
      _NUM_THREADS, thread_name_prefix='masks'
    )
    # Until when each of them has time.
    self._due: dict[Hashable, float] = {}

  def start(self, owner: Hashable, grammar: Grammar) -> None:
    """Begins a text."""
    self._submit(owner, self._guides.start, grammar)

  def advance(self, owner: Hashable, guide: Guide, token: int) -> None:
    """Goes on by a token."""
    self._submit(owner, guide.advance, token)

  def end(self, owner: Hashable) -> None:
    """Nobody waits for it any more."""
    self._due.pop(owner, None)

  def overdue(self) -> list[Hashable]:
    """Those whose time is over."""
    now = time.monotonic()
    return [owner for owner, due in self._due.items() if due < now]

  @property
  def seconds_left(self) -> float | None:
    """Until the next one is overdue; None if there is none."""
    if not self._due:
      return None
    return max(min(self._due.values()) - time.monotonic(), 0) + 0.01

  def close(self) -> None:
    self._pool.shutdown(wait=False, cancel_futures=True)

  def _submit(self, owner: Hashable, step: Callable, content: Any) -> None:
    self._due[owner] = time.monotonic() + MOST_SECONDS

    def run():
      try:
        self._put(owner, step(content), '')
      except (UserError, ValueError) as error:
        self._put(owner, None, f'the grammar can not be followed: {error}')
      except Exception as error:
        self._put(owner, None, f'the grammar has failed: {error!r}')

    self._pool.submit(run)
