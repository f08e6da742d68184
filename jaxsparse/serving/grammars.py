# SPDX-License-Identifier: Apache-2.0
"""What a text has to match: JSON, JSON of a schema, a regular expression."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxsparse.config.errors import UserError
from jaxsparse.inference.grammar import Grammar, check
from jaxsparse.serving.errors import ApiError, wrong
from jaxsparse.serving.protocol import (
  GenerationRequest,
  ResponseFormat,
  decode,
  is_set,
)

MOST_CHARACTERS = 1 << 16

# A grammar may be one that takes for ever: it must keep nobody else waiting.
_SECONDS = 5.0
_THREADS = ThreadPoolExecutor(2, 'grammars')


async def of(body: GenerationRequest) -> Grammar | None:
  """The grammar of a request, or None.

  Raises:
    ApiError: it is none, or this server has no grammars.
  """
  field, grammar = _asked(body)
  if grammar is None:
    return None
  if len(grammar.text) > MOST_CHARACTERS:
    raise wrong(
      field,
      f'{field} must have at most {MOST_CHARACTERS:,} characters, got '
      f'{len(grammar.text):,}.',
    )
  loop = asyncio.get_running_loop()
  try:
    async with asyncio.timeout(_SECONDS):
      await loop.run_in_executor(_THREADS, check, grammar)
  except TimeoutError as error:
    raise wrong(
      field, f'{field} was not understood within {_SECONDS:g} s: simplify it.'
    ) from error
  except UserError as error:
    raise wrong(field, f'{field}: {error}') from error
  return grammar


def _asked(body: GenerationRequest) -> tuple[str, Grammar | None]:
  """The field that asks for a grammar, and the grammar."""
  wanted = _of_format(body.response_format)
  if body.guided_regex is None:
    return 'response_format', wanted
  if wanted:
    raise wrong(
      'guided_regex', 'guided_regex and response_format exclude each other.'
    )
  return 'guided_regex', Grammar('regex', body.guided_regex)


def _of_format(wanted: ResponseFormat | None) -> Grammar | None:
  if wanted is None or wanted.type == 'text':
    return None
  if wanted.type == 'json_object':
    return Grammar('json_object')
  if wanted.type != 'json_schema':
    raise ApiError(
      400,
      'invalid_value',
      'response_format.type must be text, json_object or json_schema, got '
      f'{wanted.type[:40]!r}.',
      'response_format.type',
    )
  if wanted.json_schema is None or not is_set(wanted.json_schema.schema):
    raise wrong(
      'response_format.json_schema',
      'response_format.json_schema must hold a schema.',
    )
  # Nobody has looked into it yet: not even whether it is UTF-8.
  schema = bytes(wanted.json_schema.schema)
  decode(schema, Any, 'response_format.json_schema.schema')
  return Grammar('json_schema', schema.decode())
