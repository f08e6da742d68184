# SPDX-License-Identifier: Apache-2.0
"""What a text has to match: JSON, JSON of a schema, a regular expression."""

from jaxsparse.serving.errors import wrong
from jaxsparse.serving.protocol import GenerationRequest
from jaxsparse.serving.service import Service


async def of(body: GenerationRequest, service: Service) -> object | None:
  """The grammar of a request, or None.

  Raises:
    ApiError: it is none, or this server has no grammars.
  """
  if body.guided_regex is not None:
    raise wrong('guided_regex', 'guided_regex is not served here.')
  if body.response_format and body.response_format.type != 'text':
    raise wrong(
      'response_format',
      'response_format must be of type text here, got '
      f'{body.response_format.type[:40]!r}.',
    )
  return None
