# SPDX-License-Identifier: Apache-2.0
"""Requests as they come over HTTP: their fields, and what is wrong with them.

A field that is not known is refused: a typo would change results silently.
Those that change nothing here are accepted by name.
"""

import re
from typing import Any

import msgspec
from msgspec import Raw

from jaxsparse.config.errors import did_you_mean
from jaxsparse.serving.errors import ApiError, wrong

# Of an unknown field's name a sentence repeats so much.
_SHOWN = 80

_NOTHING = Raw(b'null')


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
  include_usage: bool | None = None
  include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
  name: str
  schema: Raw = _NOTHING
  strict: bool | None = None
  description: str | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
  type: str
  json_schema: JsonSchema | None = None


class GenerationRequest(
  msgspec.Struct, kw_only=True, forbid_unknown_fields=True
):
  """What both ways to ask for text have in common."""

  model: str | None = None
  max_tokens: int | None = None
  n: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  stop: str | list[str] | None = None
  seed: int | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  # Looked into only if it is not too long: keys take long to read.
  logit_bias: Raw = _NOTHING
  presence_penalty: float | None = None
  frequency_penalty: float | None = None
  response_format: ResponseFormat | None = None
  # As vLLM and llama.cpp name them.
  top_k: int | None = None
  min_p: float | None = None
  repetition_penalty: float | None = None
  min_tokens: int | None = None
  ignore_eos: bool | None = None
  stop_token_ids: list[int] | None = None
  include_stop_str_in_output: bool | None = None
  add_special_tokens: bool | None = None
  return_token_ids: bool | None = None
  cache_salt: str | None = None
  guided_regex: str | None = None
  # Change nothing here.
  user: Raw = _NOTHING
  metadata: Raw = _NOTHING
  store: Raw = _NOTHING
  service_tier: Raw = _NOTHING
  safety_identifier: Raw = _NOTHING
  prompt_cache_key: Raw = _NOTHING


class CompletionRequest(GenerationRequest, kw_only=True):
  """The body of /v1/completions."""

  # A `prompts.Given`, looked into only if it is not too long.
  prompt: Raw = _NOTHING
  echo: bool | None = None
  logprobs: int | None = None
  best_of: int | None = None
  suffix: str | None = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
  type: str
  text: str | None = None
  image_url: Raw = _NOTHING
  input_audio: Raw = _NOTHING
  file: Raw = _NOTHING


class Message(msgspec.Struct, forbid_unknown_fields=True):
  role: str
  content: str | list[ContentPart] | None = None
  name: str | None = None
  # In answers that clients send back.
  refusal: str | None = None
  annotations: Raw = _NOTHING
  tool_calls: Raw = _NOTHING
  function_call: Raw = _NOTHING
  audio: Raw = _NOTHING


class ChatRequest(GenerationRequest, kw_only=True):
  """The body of /v1/chat/completions."""

  messages: list[Message]
  max_completion_tokens: int | None = None
  logprobs: bool | None = None
  top_logprobs: int | None = None
  parallel_tool_calls: Raw = _NOTHING
  tools: Raw = _NOTHING
  tool_choice: Raw = _NOTHING
  functions: Raw = _NOTHING
  function_call: Raw = _NOTHING
  modalities: list[str] | None = None
  audio: Raw = _NOTHING


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
  """The body of /tokenize."""

  prompt: str
  add_special_tokens: bool | None = None
  model: str | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
  """The body of /detokenize."""

  tokens: list[int]
  model: str | None = None


def is_set(raw: Raw) -> bool:
  """Whether the client gave a field that is not looked into."""
  return bytes(raw).strip() not in (b'null', b'[]', b'{}')


def decode(body: bytes, kind: Any, name: str = '') -> Any:
  """The request that a body holds.

  Args:
    body: JSON in UTF-8.
    kind: one of the structs above, or another type.
    name: of the field that the body is; none for all of it.

  Raises:
    ApiError: it is no JSON, or a field's name or type is wrong.
  """
  try:
    return msgspec.json.decode(body, type=kind)
  except msgspec.ValidationError as error:
    raise _of_field(str(error), kind, name) from error
  except RecursionError as error:
    raise _no_json('it is nested too deep') from error
  # The latter is no subclass: of bytes that are no UTF-8.
  except (msgspec.DecodeError, UnicodeDecodeError) as error:
    why = str(error)
    if not body.strip():
      why = 'it is empty'
    elif re.search(rb'\\u[dD][89a-fA-F]', body):
      why += '; escapes of surrogates such as \\ud83d must come in pairs'
    raise _no_json(why) from error


def _no_json(why: str) -> ApiError:
  return ApiError(400, 'invalid_json', f'The body is not valid JSON: {why}.')


def _of_field(text: str, kind: Any, name: str) -> ApiError:
  """The error of a field, from what msgspec says of it."""
  what, _, path = text.partition(' - at `')
  path = path.removesuffix('`').removeprefix('$').replace('key` in `$', '')
  path = (name + path).removeprefix('.')[:_SHOWN]
  if match := re.fullmatch(
    'Object contains unknown field `(.*)`', what, re.DOTALL
  ):
    name = match[1][:_SHOWN]
    known = () if path else kind.__struct_fields__
    where = f' of {path}' if path else ''
    message = f'There is no field {name!r}{where}{did_you_mean(name, known)}.'
    return ApiError(400, 'unknown_field', message, f'{path}.{name}'.strip('.'))
  what = what.replace('`', '').replace(' | null', '')
  if what.startswith('Expected'):
    what = what[0].lower() + what[1:]
    return wrong(path or None, f'{path or "The body"}: {what}.')
  if 'missing required field' in what:
    name = what.rpartition(' ')[2]
    return wrong(f'{path}.{name}'.strip('.'), f'The field {name} is missing.')
  return wrong(path or None, f'{path or "The body"}: {what}.')
