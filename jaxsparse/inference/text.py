# SPDX-License-Identifier: Apache-2.0
"""From tokens to text as they come: UTF-8, stop strings, whole completions."""

import codecs
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxsparse.analysis import free_memory
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require, require_utf8
from jaxsparse.inference.decoding import generate_tokens
from jaxsparse.inference.long_input import Reading
from jaxsparse.inference.sampling import Sampling

# Tokens before a new one that decide how it is spelled, such as its space.
_SPELLING_CONTEXT = 8

# Of a file that is read at once.
_PART = 1 << 22

# Memory for each byte of a file: itself and its text, then its text and an
# int32 for its token, three copies of which are held for a while.
_BYTES_PER_BYTE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What to continue, how far and how."""

  # Any text; with none the model begins a document.
  prompt: str = ''
  # Most tokens to draw; the end of a document ends the text earlier.
  max_tokens: int = 200
  # The text ends before the one that appears first; none is part of it.
  stop: tuple[str, ...] = ()
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  seed: int = 0

  def __post_init__(self):
    if self.max_tokens < 1:
      raise UserError(f'max_tokens must be at least 1, got {self.max_tokens}.')
    if not 0 <= self.seed < 2**32:
      raise UserError(
        f'seed must be within 0 and {2**32 - 1}, got {self.seed}.'
      )
    require(
      isinstance(self.stop, tuple) and '' not in self.stop,
      'stop must be a tuple of strings, none of them empty, got '
      f'{self.stop!r}.',
    )
    require_utf8('prompt', self.prompt)
    for text in self.stop:
      require_utf8('stop', text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What the model wrote."""

  # Without the prompt and the stop string.
  text: str
  # Tokens drawn, the end of the document and a stop string among them.
  num_tokens: int
  # Seconds to the first token, compilation included, and from it to the last.
  first_token_seconds: float
  seconds: float

  @property
  def tokens_per_second(self) -> float:
    """Rate after the first token; 0 when there was only one."""
    return (self.num_tokens - 1) / self.seconds if self.num_tokens > 1 else 0.0


def complete(
  model_config: ModelConfig,
  params: dict,
  tokenizer: Any,
  request: Request,
  write: Callable[[str], Any] | None = None,
  on_reading: Callable[[Reading], None] = lambda reading: None,
) -> Completion:
  """Continues one prompt.

  Args:
    model_config: the trained model; a vocab_size of 0 is the tokenizer's.
    params: its parameters.
    tokenizer: with which it was trained.
    request: what to continue and how; the same one gives the same text.
    write: called with each piece of text as soon as it is certain.
    on_reading: called as a long prompt is read, chunk by chunk.

  Returns:
    The text and how long it took.
  """
  model_config = model_config.with_vocabulary(tokenizer.vocab_size)
  prompt_ids = encode_prompt(tokenizer, request.prompt)
  # When the first and the last token came.
  times: tuple[float, ...] = ()
  start, num_tokens, pieces = time.monotonic(), 0, []

  def tokens() -> Iterator[int]:
    nonlocal times, num_tokens
    for batch in generate_tokens(
      model_config,
      params,
      [prompt_ids],
      request.max_tokens,
      request.sampling,
      request.seed,
      on_reading,
    ):
      now = time.monotonic()
      times, num_tokens = (*times[:1], now), num_tokens + 1
      yield int(batch[0])

  for piece in stream_text(tokens(), tokenizer, prompt_ids, request.stop):
    pieces.append(piece)
    if write:
      write(piece)
  return Completion(
    text=''.join(pieces),
    num_tokens=num_tokens,
    first_token_seconds=times[0] - start,
    seconds=times[-1] - times[0],
  )


def read_file(flag: str, path: str) -> str:
  """The text of a file as training sees it: every byte but a first mark.

  Args:
    flag: that names the file, such as '--prompt_file=', for messages.
    path: of UTF-8 text, with or without a byte order mark.

  Raises:
    UserError: the file can't be read, is no UTF-8, or is larger than memory.
  """
  name = flag + path
  try:
    content = _read_bounded(name, pathlib.Path(path).expanduser())
  except (OSError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f"{name} can't be read ({reason}): name a text file."
    ) from error
  begin = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
  try:
    return str(memoryview(content)[begin:], 'utf-8')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{name} must be UTF-8 text, but its byte {begin + error.start} is not.'
    ) from error


def _read_bounded(name: str, path: pathlib.Path) -> bytearray:
  """All bytes, unless they, their text and their tokens can't be in memory."""
  available = free_memory.of_host()
  most = sys.maxsize if available is None else available // _BYTES_PER_BYTE
  content = bytearray()
  with path.open('rb') as file:
    while part := file.read(_PART):
      content += part
      if len(content) > most:
        raise UserError(
          f'{name} is longer than the {free_memory.words(most)} of text that '
          'fit into memory here: give a smaller file.'
        )
  return content


def encode_prompt(tokenizer: Any, prompt: str) -> np.ndarray:
  """The tokens of a prompt, which begins a document: int32 [T]."""
  begin = np.array([tokenizer.begin_id], np.int32)
  return np.concatenate([begin, tokenizer.encode(prompt)])


def stream_text(
  tokens: Iterable[int],
  tokenizer: Any,
  prompt_ids: Sequence[int] | np.ndarray,
  stop: tuple[str, ...] = (),
) -> Iterator[str]:
  """Text of the tokens that follow a prompt, up to the document's end.

  Args:
    tokens: ids as they come; not read further than needed.
    tokenizer: whose `stop_ids` end the text.
    prompt_ids: what stands before the first token.
    stop: strings that end the text and are left out.

  Yields:
    Whole characters. Those that may turn out to begin a stop string are held
    back until that is decided.
  """
  stream = TextStream(tokenizer, prompt_ids, stop)
  for token in tokens:
    if token in tokenizer.stop_ids:
      break
    yield stream.feed(token)
    if stream.stop_found is not None:
      return
  yield stream.finish()


class TextStream:
  """Text of tokens that are pushed one by one, up to a stop string.

  Attributes:
    stop_found: the stop string that has ended the text; None before.
    num_chars: characters of all tokens so far, held ones among them: before a
      token is fed, where in the text it begins.
  """

  def __init__(
    self,
    tokenizer: Any,
    prompt_ids: Sequence[int] | np.ndarray,
    stop: tuple[str, ...] = (),
    include_stop: bool = False,
  ):
    """Begins after a prompt.

    Args:
      tokenizer: of the tokens.
      prompt_ids: what stands before the first token.
      stop: strings that end the text; of several the one that begins first.
      include_stop: whether the text ends behind it.
    """
    self.num_chars = 0
    self._spelling = tokenizer.decode_bytes
    self._context = list(prompt_ids[-_SPELLING_CONTEXT:])
    self._before = self._spelling(self._context)
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
    self._cut = _Cut(stop, include_stop)

  @property
  def stop_found(self) -> str | None:
    return self._cut.found

  def feed(self, token: int) -> str:
    """What is certain by this token: whole characters, and no beginning of a
    stop string. Nothing once one was found."""
    spelled = self._spelling([*self._context, token])
    piece = spelled[len(self._before) :]
    self._context = [*self._context, token][-_SPELLING_CONTEXT:]
    self._before = self._spelling(self._context)
    return self._decoded(piece)

  def finish(self) -> str:
    """What was held back, when no token comes any more."""
    return self._decoded(b'', final=True) + self._cut.finish()

  def _decoded(self, piece: bytes, final: bool = False) -> str:
    text = self._decoder.decode(piece, final)
    self.num_chars += len(text)
    return self._cut.feed(text)


def decode_utf8(pieces: Iterable[bytes]) -> Iterator[str]:
  """Whole characters; U+FFFD for what is no UTF-8."""
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  for piece in pieces:
    yield decoder.decode(piece)
  yield decoder.decode(b'', final=True)


def until_stop(texts: Iterable[str], stop: tuple[str, ...]) -> Iterator[str]:
  """The texts up to where the first of the stop strings begins.

  Also across the ends of texts: what may be the beginning of one is held back.
  """
  cut = _Cut(stop)
  for text in texts:
    yield cut.feed(text)
    if cut.found is not None:
      return
  yield cut.finish()


class _Cut:
  """Texts up to a stop string, across their ends."""

  def __init__(self, stop: tuple[str, ...], include_stop: bool = False):
    self.found: str | None = None
    self._stop, self._include_stop, self._held = stop, include_stop, ''

  def feed(self, text: str) -> str:
    if self.found is not None:
      return ''
    held = self._held + text
    certain = _opening(held, self._stop)
    self._held = held[certain:]
    if not self._held.startswith(self._stop):
      return held[:certain]
    whole = (s for s in self._stop if self._held.startswith(s))
    return held[:certain] + self._end(next(whole))

  def finish(self) -> str:
    """What was held; a stop string may be in it behind another's beginning."""
    held = self._held
    found = {held.index(s): s for s in reversed(self._stop) if s in held}
    if self.found is not None or not found:
      self._held = ''
      return '' if self.found is not None else held
    first = min(found)
    return held[:first] + self._end(found[first])

  def _end(self, stop: str) -> str:
    self.found, self._held = stop, ''
    return stop if self._include_stop else ''


def _opening(text: str, stops: tuple[str, ...]) -> int:
  """Where in the text one of `stops` begins, or may yet turn out to."""
  for i in range(len(text)):
    # Ends at the first, so that many stop strings cost little a token.
    if any(stop.startswith(text[i : i + len(stop)]) for stop in stops):
      return i
  return len(text)
