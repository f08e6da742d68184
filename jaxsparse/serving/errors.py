# SPDX-License-Identifier: Apache-2.0
"""Errors as clients of OpenAI's protocol read them."""

from typing import Any

import msgspec
from starlette.responses import Response

from jaxsparse.config.errors import UserError
from jaxsparse.inference import jobs

# Codes of all errors: labels of a metric come from a closed set.
CODES = (
  'invalid_value',
  'invalid_json',
  'unknown_field',
  'context_length_exceeded',
  'chat_template_missing',
  'invalid_api_key',
  'model_not_found',
  'not_found',
  'method_not_allowed',
  'request_timeout',
  'request_too_large',
  'unsupported_media_type',
  'queue_full',
  'server_error',
  'unavailable',
  'time_limit',
)

# Seconds after which to ask again.
_STARTING, _DRAINING = 5, 10


class ApiError(Exception):
  """What ends a request: a status, a sentence and what a program reads."""

  def __init__(
    self,
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    retry_after: int | None = None,
  ):
    """Makes the error.

    Args:
      status: of HTTP.
      code: one of `CODES`.
      message: one sentence for a person.
      param: the field that is wrong.
      retry_after: seconds after which the same request may succeed.
    """
    super().__init__(message)
    self.status, self.code, self.message = status, code, message
    self.param, self.retry_after = param, retry_after

  @property
  def body(self) -> dict[str, Any]:
    return {
      'error': {
        'message': self.message,
        'type': _type_of(self.status),
        'param': self.param,
        'code': self.code,
      }
    }

  @property
  def headers(self) -> dict[str, str]:
    headers = {}
    if self.retry_after is not None:
      headers['retry-after'] = str(self.retry_after)
    if self.status in (500, 504):
      # The official client asks again otherwise, and what killed an engine
      # would kill the next.
      headers['x-should-retry'] = 'false'
    if self.status == 401:
      # So that a browser asks for the key as a password.
      headers['www-authenticate'] = 'Basic realm="model-server"'
    if self.status == 408:
      headers['connection'] = 'close'
    return headers

  def response(self) -> Response:
    return Response(
      msgspec.json.encode(self.body),
      self.status,
      self.headers,
      'application/json',
    )


def _type_of(status: int) -> str:
  if status == 429:
    return 'rate_limit_error'
  return 'server_error' if status >= 500 else 'invalid_request_error'


def wrong(param: str | None, message: str) -> ApiError:
  """A field's value is wrong."""
  return ApiError(400, 'invalid_value', message, param)


def from_engine(error: Exception) -> ApiError:
  """What the engine's refusal of jobs is to a client."""
  match error:
    case jobs.QueueFull():
      return ApiError(
        429, 'queue_full', str(error), retry_after=error.retry_after
      )
    case jobs.Starting():
      return ApiError(503, 'unavailable', str(error), retry_after=_STARTING)
    case jobs.Unavailable():
      return ApiError(503, 'unavailable', str(error), retry_after=_DRAINING)
    case UserError():
      return wrong(None, str(error))
  raise error


def of_event(event: jobs.Event, is_alive: bool) -> ApiError | None:
  """What a job that did not come to its end is to a client.

  Args:
    event: the last one of the job, or one before it.
    is_alive: whether the engine is.
  """
  if event.finish == 'abort':
    message = f'The request was ended: {event.error or "cancelled"}.'
    return ApiError(503, 'unavailable', message, retry_after=_DRAINING)
  if event.finish == 'error' and is_alive:
    # Of this job alone, such as a grammar that can't be followed.
    why = event.error.rstrip('.')
    return wrong(None, f'The request can not be served: {why}.')
  if event.finish == 'error':
    message = f'The engine failed; its log says more of {event.job_id}.'
    return ApiError(500, 'server_error', message)
  return None
