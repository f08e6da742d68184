# SPDX-License-Identifier: Apache-2.0
"""The routes of the server, what guards them, and how errors are told."""

import base64
import contextlib
import hashlib
import importlib.resources
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jaxsparse.config.errors import UserError, shown
from jaxsparse.inference.served_adapters import NoPlace
from jaxsparse.serving import metrics
from jaxsparse.serving.chat import chat
from jaxsparse.serving.completions import complete
from jaxsparse.serving.errors import ApiError, wrong
from jaxsparse.serving.gate import Gate, read_body
from jaxsparse.serving.options import in_vocabulary
from jaxsparse.serving.protocol import (
  DetokenizeRequest,
  TokenizeRequest,
  decode,
)
from jaxsparse.serving.service import Service
from jaxsparse.serving.work import log


def make(
  service: Service, key: str = '', origins: Sequence[str] = ()
) -> Starlette:
  """The app.

  Args:
    service: that it gives out.
    key: which clients must send; with none all may ask.
    origins: of web pages that may read answers.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    service.start()
    yield
    service.stop()

  # The first is the outermost: a browser asks without a key what it may do.
  layers = []
  if origins:
    layers.append(
      Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=['GET', 'POST'],
        allow_headers=['authorization', 'content-type'],
      )
    )
  if key:
    layers.append(Middleware(Gate, key=key, reject=service.metrics.reject))
  app = Starlette(
    routes=[
      Route('/v1/completions', complete, methods=['POST']),
      Route('/v1/chat/completions', chat, methods=['POST']),
      Route('/v1/models', _models),
      Route('/v1/models/{name:path}/reload', _reload, methods=['POST']),
      Route('/v1/models/{name:path}', _model),
      Route('/tokenize', _tokenize, methods=['POST']),
      Route('/detokenize', _detokenize, methods=['POST']),
      Route('/tokenizer_info', _tokenizer_info),
      Route('/health', _health),
      Route('/metrics', _metrics),
      Route('/', _page()),
    ],
    middleware=layers,
    exception_handlers={
      ApiError: _on_api_error,
      HTTPException: _on_http_error,
      ClientDisconnect: _on_disconnect,
      Exception: _on_defect,
    },
    lifespan=lifespan,
  )
  app.router.redirect_slashes = False
  app.state.service = service
  return app


def _json(body: Any, status: int = 200) -> Response:
  return Response(msgspec.json.encode(body), status, media_type=_JSON)


_JSON = 'application/json'


async def _models(request: Request) -> Response:
  service: Service = request.app.state.service
  return _json({'object': 'list', 'data': service.models()})


async def _model(request: Request) -> Response:
  service: Service = request.app.state.service
  name = request.path_params['name']
  service.require_model(name)
  return _json(service.model(name))


async def _reload(request: Request) -> Response:
  """Reads an adapter's folder again, for texts that begin from now on."""
  service: Service = request.app.state.service
  service.require_ready()
  name = request.path_params['name']
  if not service.require_model(name):
    raise wrong('name', f'{name!r} is the model, which has no folder to read.')
  try:
    await service.in_thread(service.reload, name)
  except UserError as error:
    raise wrong('name', str(error)) from error
  except NoPlace as error:
    raise ApiError(503, 'unavailable', str(error), retry_after=5) from error
  return _json(service.model(name))


async def _health(request: Request) -> Response:
  """Whether requests are answered; nothing is generated for it."""
  service: Service = request.app.state.service
  if trouble := service.trouble():
    error = ApiError(503, 'unavailable', trouble, retry_after=5)
    return error.response()
  return _json({'status': 'ready'})


async def _metrics(request: Request) -> Response:
  service: Service = request.app.state.service
  return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


async def _tokenize(request: Request) -> Response:
  service: Service = request.app.state.service
  limits = service.limits
  content = await read_body(request, limits.body_bytes, limits.body_seconds)
  body = decode(content, TokenizeRequest)
  service.require_model(body.model)
  has_boundary = body.add_special_tokens is not False
  tokenizer = service.tokenizer
  named = {
    service.names(token): token
    for token in (tokenizer.boundary_id, tokenizer.begin_id)
  }
  if body.prompt in named:
    # So clients that have a tokenizer's name for it find its id. In a longer
    # text it is a text like any other.
    tokens = [named[body.prompt]]
  else:
    found = await service.in_thread(tokenizer.encode, body.prompt)
    tokens = [tokenizer.begin_id] * has_boundary + found.tolist()
  return _json(
    {
      'tokens': tokens,
      'count': len(tokens),
      'max_model_len': service.engine.limit,
    }
  )


async def _detokenize(request: Request) -> Response:
  service: Service = request.app.state.service
  limits = service.limits
  content = await read_body(request, limits.body_bytes, limits.body_seconds)
  body = decode(content, DetokenizeRequest)
  service.require_model(body.model)
  for extreme in (min(body.tokens), max(body.tokens)) if body.tokens else ():
    in_vocabulary('tokens', extreme, service.vocab_size)

  def text() -> str:
    content = service.tokenizer.decode_bytes(body.tokens)
    return content.decode('utf-8', 'replace')

  return _json({'prompt': await service.in_thread(text)})


async def _tokenizer_info(request: Request) -> Response:
  """What evaluations look for that have no tokenizer of their own."""
  service: Service = request.app.state.service
  template, tokenizer = service.template, service.tokenizer
  return _json(
    {
      'eos_token': service.names(tokenizer.boundary_id),
      'bos_token': service.names(tokenizer.begin_id),
      'pad_token': None,
      'chat_template': template and template.source,
    }
  )


def _page() -> Callable[[Request], Awaitable[Response]]:
  """The page at /, which may load nothing and talk to this server only."""
  content = (importlib.resources.files(__package__) / 'page.html').read_bytes()
  hashes = {
    name.decode(): _hash(text)
    for name, text in re.findall(
      rb'<(script|style)>(.*?)</\1>', content, re.DOTALL
    )
  }
  headers = {
    'content-security-policy': "default-src 'none'; connect-src 'self'; "
    f"script-src '{hashes['script']}'; style-src '{hashes['style']}'; "
    "img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    'x-content-type-options': 'nosniff',
    'referrer-policy': 'no-referrer',
  }

  async def page(request: Request) -> Response:
    return Response(content, 200, headers, 'text/html')

  return page


def _hash(content: bytes) -> str:
  digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
  return f'sha256-{digest}'


async def _on_api_error(request: Request, error: ApiError) -> Response:
  request.app.state.service.metrics.reject(error.code)
  return error.response()


async def _on_http_error(request: Request, error: HTTPException) -> Response:
  """What starlette itself has to say."""
  path = shown(request.url.path)
  if error.status_code == 405:
    allowed = (error.headers or {}).get('Allow', '')
    found = ApiError(
      405, 'method_not_allowed', f'{path} takes {allowed or "other methods"}.'
    )
  elif error.status_code == 404:
    found = ApiError(404, 'not_found', f'There is nothing at {path}.')
  else:
    found = ApiError(error.status_code, 'invalid_value', str(error.detail))
  response = await _on_api_error(request, found)
  response.headers.update(error.headers or {})
  return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
  """Nobody reads it."""
  return Response(status_code=499)


async def _on_defect(request: Request, error: Exception) -> Response:
  i = uuid.uuid4().hex
  # uvicorn logs the traceback.
  log.error('defect %s', i)
  message = f'The server failed; its log says more of {i}.'
  return await _on_api_error(request, ApiError(500, 'server_error', message))
