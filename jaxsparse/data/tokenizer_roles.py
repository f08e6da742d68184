# SPDX-License-Identifier: Apache-2.0
"""What stands beside a published tokenizer: the roles of its tokens.

The files are those of Hugging Face's folders, under the same names.
"""

import dataclasses
import hashlib
import json
from typing import Any

from etils import epath

from jaxsparse.config.errors import UserError
from jaxsparse.run import workdir as workdir_lib

CONFIG = 'tokenizer_config.json'
# Of older folders, where the roles may be instead.
SPECIAL = 'special_tokens_map.json'
GENERATION = 'generation_config.json'
CHAT_TEMPLATE = 'chat_template.jinja'
FILES = (CONFIG, SPECIAL, GENERATION, CHAT_TEMPLATE)

# What a document ends with in vocabularies of others; the first one is ours.
BOUNDARIES = ('<|endoftext|>', '</s>', '<|end_of_text|>', '<eos>', '<|eos|>')


def copy_tokenizer(source: epath.PathLike, workdir: epath.PathLike) -> None:
  """Brings another workdir's tokenizer and what stands beside it, if any."""
  for name in (*workdir_lib.TOKENIZERS, *FILES):
    path = epath.Path(source) / name
    if path.exists():
      workdir_lib.write_whole(epath.Path(workdir) / name, path.read_bytes())


def digest(workdir: epath.PathLike) -> str:
  """The same for the same tokenizer and roles of its tokens."""
  found = hashlib.sha256()
  for name in (*workdir_lib.TOKENIZERS, *FILES):
    path = epath.Path(workdir) / name
    if path.exists():
      content = path.read_bytes()
      found.update(f'{name} {len(content)} '.encode() + content)
  return found.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
  """Tokens that a model begins and ends with, by their texts and ids."""

  # What ends an answer; of a model that was not trained to chat, a document.
  eos: str | None = None
  bos: str | None = None
  # Whether a text is read behind `bos`; None leaves it to tokenizer.json.
  adds_bos: bool | None = None
  # Ids that end an answer besides.
  stop_ids: tuple[int, ...] = ()

  @classmethod
  def read(cls, folder: epath.PathLike) -> 'Roles | None':
    """Those in a folder; None if its tokenizer stands alone.

    Raises:
      UserError: a file of it can't be read.
    """
    parts = [read_json(folder, name) for name in (SPECIAL, CONFIG)]
    if parts == [None, None]:
      return None
    config = {
      name: value
      for part in parts
      for name, value in (part or {}).items()
      if value is not None
    }
    stop = (read_json(folder, GENERATION) or {}).get('eos_token_id')
    stop = stop if isinstance(stop, list) else [stop]
    return cls(
      eos=text_of(config.get('eos_token')),
      bos=text_of(config.get('bos_token')),
      adds_bos=config.get('add_bos_token'),
      stop_ids=tuple(i for i in stop if isinstance(i, int)),
    )

  def boundary(self, ids: dict[str, int]) -> int | None:
    """The token that ends a document.

    It is `eos`, but for models of chats: those end an answer with a mark that
    no document ends with, and have kept the token that does.

    Args:
      ids: of special tokens by their texts.
    """
    own = [] if self.eos is None else [self.eos]
    known = [x for x in own if x in BOUNDARIES]
    return next((ids[x] for x in (*known, *BOUNDARIES, *own) if x in ids), None)


def read_json(folder: epath.PathLike, name: str) -> dict[str, Any] | None:
  """A file's object; None if there is no file.

  Raises:
    UserError: it is no object of JSON.
  """
  path = epath.Path(folder) / name
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
      raise ValueError('it is no object')
    return found
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(
      f"{str(path)!r} can't be read ({error}): give the file as it was "
      'published.'
    ) from error


def chat_template(folder: epath.PathLike) -> str | None:
  """The template of chats in a folder; of several the one named default.

  Raises:
    UserError: the file that should hold it can't be read.
  """
  path = epath.Path(folder) / CHAT_TEMPLATE
  if path.exists():
    try:
      return path.read_text()
    except (OSError, ValueError) as error:
      raise UserError(f"{str(path)!r} can't be read ({error}).") from error
  found = (read_json(folder, CONFIG) or {}).get('chat_template')
  if isinstance(found, list):
    named = [x for x in found if isinstance(x, dict)]
    named.sort(key=lambda x: x.get('name') != 'default')
    found = named[0].get('template') if named else None
  return found if isinstance(found, str) else None


def text_of(token: Any) -> str | None:
  """The text of a token, which is given plain or with its settings."""
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else None
