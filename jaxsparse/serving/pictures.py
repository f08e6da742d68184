# SPDX-License-Identifier: Apache-2.0
"""Pictures in the messages of chats: data URLs, and nothing is fetched."""

import base64
import binascii
import math
import re

import msgspec
import numpy as np

from jaxsparse.config import MultiModalConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.data.pictures.decode import read_picture
from jaxsparse.serving.errors import ApiError, wrong
from jaxsparse.serving.protocol import ContentPart, Message, decode

# Of a file, and of what becomes of it while it is read.
MOST_BYTES, MOST_PIXELS = 8 << 20, 1 << 24
# Of a body with such a file, four letters for three bytes, and with a text.
BODY_MIB = 12

_FORM = '"url": "data:image/png;base64,..."'
_DATA = re.compile(r'data:image/[\w.+-]+;base64,', re.ASCII | re.IGNORECASE)
_ADDRESS = re.compile(r'(https?|ftp|file):', re.IGNORECASE)

# Of models that describe pictures and were trained on no chats: what is said is
# what the description begins with.
CAPTIONS = ChatTemplate(
  "{% if messages | length > 1 %}{{ raise_exception('this model was trained "
  "on no chats, so send one message') }}{% endif %}"
  '{{ messages[0].content }}'
)


class ImageUrl(msgspec.Struct, forbid_unknown_fields=True):
  """What a part of type 'image_url' holds."""

  url: str
  # All are read at the model's own size.
  detail: str | None = None


def of_chat(
  messages: list[Message], settings: MultiModalConfig
) -> np.ndarray | None:
  """The picture of a chat, uint8 [S, S, 3]; None if there is none.

  Raises:
    ApiError: there are several, or it can't be read.
  """
  found = [
    (part, f'messages[{i}].content[{j}].image_url')
    for i, message in enumerate(messages)
    if isinstance(message.content, list)
    for j, part in enumerate(message.content)
    if part.type == 'image_url'
  ]
  if not found:
    return None
  if len(found) > 1:
    raise wrong(
      'messages',
      'messages must hold one picture, as this model was trained on one with '
      f'each text; got {len(found)}.',
    )
  return _picture(*found[0], settings.vision.image_size)


def _picture(part: ContentPart, where: str, size: int) -> np.ndarray:
  url = _url(part, where)
  start = _DATA.match(url)
  if not start:
    raise wrong(f'{where}.url', _told(url, where))
  # Four letters are three bytes.
  if len(url) - start.end() > math.ceil(MOST_BYTES / 3) * 4:
    raise ApiError(
      413,
      'request_too_large',
      f'{where} must hold at most {MOST_BYTES >> 20} MiB of a file, got about '
      f'{len(url) * 3 / 4 / (1 << 20):.1f} MiB: send a smaller picture.',
      f'{where}.url',
    )
  try:
    content = base64.b64decode(url[start.end() :], validate=True)
  except (binascii.Error, ValueError) as error:
    raise wrong(
      f'{where}.url', f'{where}.url is no base64 ({error}): write {_FORM}.'
    ) from error
  try:
    return read_picture(content, size, where, MOST_PIXELS)
  except UserError as error:
    raise wrong(f'{where}.url', str(error)) from error


def _url(part: ContentPart, where: str) -> str:
  found = decode(bytes(part.image_url), ImageUrl | None, where)
  if found is None:
    raise wrong(where, f'{where} is missing: write {{{_FORM}}}.')
  return found.url


def _told(url: str, where: str) -> str:
  if _ADDRESS.match(url):
    return (
      f'{where}.url is an address, and nothing is fetched here: send the '
      f'picture itself, {_FORM}.'
    )
  return f'{where}.url must be {_FORM}, got {url[:40]!r}.'
