# SPDX-License-Identifier: Apache-2.0
"""What the routes of a server share: the engine, the model's name, limits."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxsparse.config import MultiModalConfig
from jaxsparse.config.errors import shown
from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.serving.errors import ApiError
from jaxsparse.serving.http_server import REQUEST_SECONDS
from jaxsparse.serving.metrics import Metrics
from jaxsparse.serving.prompts import TokenNames
from jaxsparse.serving.work import Delivery, log

_OWNER = 'jaxsparse'

# Texts become tokens in threads, beside the loop.
_TOKENIZER_THREADS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Bounds of requests that are not the engine's own."""

  body_bytes: int = 4 << 20
  body_seconds: float = REQUEST_SECONDS
  # In all, whatever a request asks for.
  request_seconds: float = 600.0
  # A step that takes longer is taken for one that never ends.
  heartbeat_seconds: float = 60.0


class Service:
  """One model, served."""

  def __init__(
    self,
    engine: Any,
    tokenizer: Any,
    *,
    name: str,
    vocab_size: int,
    step: Callable[[], int] = lambda: 0,
    template: ChatTemplate | None = None,
    limits: Limits | None = None,
    metrics: Metrics | None = None,
    logs_text: bool = False,
    adapters: Sequence[str] = (),
    reload: Callable[[str], None] = lambda name: None,
    pictures: MultiModalConfig | None = None,
  ):
    """Makes the service.

    Args:
      engine: that draws; it may still be starting.
      tokenizer: of the model.
      name: by which clients ask for the model.
      vocab_size: of the model.
      step: of its checkpoint, once that is read.
      template: of chats; None where the model has none.
      limits: of requests.
      metrics: to which the engine reports, too.
      logs_text: whether the log holds what was written.
      adapters: names by which clients ask for the model with one of them.
      reload: reads an adapter's folder again, in any thread.
      pictures: of a model that sees; None of one of text alone.
    """
    self.engine, self.tokenizer = engine, tokenizer
    self.name, self.vocab_size = name, vocab_size
    self.names = TokenNames(tokenizer)
    self.template = template
    self.limits = limits or Limits()
    self.metrics = metrics or Metrics()
    self.metrics.watch(engine.stats, engine.heartbeat_age, step)
    self.created = int(time.time())
    self.delivery: Delivery | None = None
    self.adapters, self.reload = tuple(adapters), reload
    self.pictures = pictures
    self._logs_text = logs_text
    self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, 'tokenizer')

  def start(self) -> None:
    """To be called in the loop that serves."""
    self.delivery = Delivery(asyncio.get_running_loop())

  def stop(self) -> None:
    self._threads.shutdown(wait=False, cancel_futures=True)

  async def in_thread(self, function: Callable, *args: Any, **kw: Any) -> Any:
    loop = asyncio.get_running_loop()
    call = lambda: function(*args, **kw)  # noqa: E731
    return await loop.run_in_executor(self._threads, call)

  def trouble(self) -> str:
    """Why no text can be had now, in a sentence, or ''."""
    state = self.engine.state
    if state == 'starting':
      return f'The server is starting: {self.engine.stage or "loading"}.'
    if self.engine.failure is not None:
      return 'The engine has failed: its log says why.'
    if state != 'ready':
      return 'The server is ending: it takes no more requests.'
    age = self.engine.heartbeat_age()
    if age > self.limits.heartbeat_seconds:
      return f'The engine has not moved for {age:.0f} s.'
    return ''

  def require_ready(self) -> None:
    if self.engine.state != 'ready':
      raise ApiError(503, 'unavailable', self.trouble(), retry_after=5)

  def require_model(self, name: str | None) -> str:
    """Names are compared, never joined to a path.

    Returns:
      The adapter that is asked for by it; empty for the model alone.
    """
    if name in self.adapters:
      return name
    if name not in (None, self.name):
      there = ' or '.join(map(repr, (self.name, *self.adapters)))
      raise ApiError(
        404,
        'model_not_found',
        f'There is no model {shown(name)} here: there is {there}.',
        'model',
      )
    return ''

  def models(self) -> list[dict[str, Any]]:
    return [self.model(name) for name in (self.name, *self.adapters)]

  def model(self, name: str) -> dict[str, Any]:
    return {
      'id': name,
      'object': 'model',
      'created': self.created,
      'owned_by': _OWNER,
      'max_model_len': self.engine.limit,
      **({'parent': self.name} if name in self.adapters else {}),
    }

  def on_text(self, job: Any, text: str) -> None:
    if self._logs_text:
      log.info('%s wrote %r', job.id, text)
