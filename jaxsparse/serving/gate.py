# SPDX-License-Identifier: Apache-2.0
"""What stands before all routes: the key, and the bounds of a body."""

import asyncio
import base64
import binascii
import hmac
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from jaxsparse.serving.errors import ApiError

# Answered without a key: who watches a server has none.
_OPEN_PATHS = ('/health',)


class Gate:
  """ASGI middleware that lets those pass who know the key."""

  def __init__(self, app: Any, key: str, reject: Callable[[str], None]):
    """Wraps an app.

    Args:
      app: of ASGI.
      key: that clients must send.
      reject: counts a refusal by its code.
    """
    self._app, self._key, self._reject = app, key.encode(), reject

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope['type'] == 'http' and scope['path'] not in _OPEN_PATHS:
      given = _given_key(Headers(scope=scope).get('authorization', ''))
      if not hmac.compare_digest(given, self._key):
        error = ApiError(
          401,
          'invalid_api_key',
          'The key is missing or wrong: send it as "Authorization: Bearer '
          'KEY".',
        )
        self._reject(error.code)
        await error.response()(scope, receive, send)
        return
    await self._app(scope, receive, send)


def _given_key(header: str) -> bytes:
  """The key of a header: of clients, or a password that a browser asked for."""
  scheme, _, value = header.partition(' ')
  if scheme.lower() == 'bearer':
    return value.strip().encode('utf-8', 'replace')
  if scheme.lower() == 'basic':
    try:
      pair = base64.b64decode(value.strip(), validate=True)
    except (binascii.Error, ValueError):
      return b''
    return pair.partition(b':')[2]
  return b''


async def read_body(request: Request, most: int, seconds: float) -> bytes:
  """The body of a request, JSON by its header.

  Args:
    request: whose body has not been read.
    most: bytes.
    seconds: until it must be there.

  Raises:
    ApiError: it is too large, too late or of another type.
    ClientDisconnect: the client is gone.
  """
  kind = request.headers.get('content-type', '').partition(';')[0].strip()
  # Other types a web page could send to a server on the same machine.
  if kind.lower() != 'application/json':
    raise ApiError(
      415,
      'unsupported_media_type',
      'The body must be JSON: send "content-type: application/json".',
    )
  length = request.headers.get('content-length', '')
  if length.isdecimal() and int(length[:20]) > most:
    raise _too_large(most)
  body = bytearray()
  try:
    async with asyncio.timeout(seconds):
      async for part in request.stream():
        body += part
        if len(body) > most:
          raise _too_large(most)
  except TimeoutError as error:
    raise ApiError(
      408,
      'request_timeout',
      f'The body was not there within {seconds:g} s.',
    ) from error
  return bytes(body)


def _too_large(most: int) -> ApiError:
  return ApiError(
    413,
    'request_too_large',
    f'The body must be at most {most:,} bytes: send less, or start the server '
    'with a larger --body-mib.',
  )


async def while_connected(receive: Any, work: Any) -> Any:
  """The result of a coroutine, which is cancelled if the client leaves.

  Raises:
    ClientDisconnect: it left.
  """
  tasks = [
    asyncio.ensure_future(work),
    asyncio.ensure_future(_disconnection(receive)),
  ]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise ClientDisconnect
    return tasks[0].result()
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnection(receive: Any) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass
