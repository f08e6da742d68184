"""From tokens to text as they come: UTF-8, stop strings, whole completions."""

import codecs
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxsparse.config import ModelConfig
from jaxsparse.errors import UserError
from jaxsparse.inference.decoding import generate_tokens
from jaxsparse.inference.long_input import Reading
from jaxsparse.inference.sampling import Sampling

# Tokens before a new one that decide how it is spelled, such as its space.
_SPELLING_CONTEXT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What to continue, how far and how."""

  # Any text; with none the model begins a document.
  prompt: str = ''
  # Most tokens to draw; the end of a document ends the text earlier.
  max_tokens: int = 200
  # Ends the text when it appears, and is not part of it; '' for none.
  stop: str = ''
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  seed: int = 0

  def __post_init__(self):
    if self.max_tokens < 1:
      raise UserError(f'max_tokens must be at least 1, got {self.max_tokens}.')
    if not 0 <= self.seed < 2**32:
      raise UserError(
        f'seed must be within 0 and {2**32 - 1}, got {self.seed}.'
      )
    for name in ('prompt', 'stop'):
      try:
        getattr(self, name).encode()
      except UnicodeEncodeError as error:
        raise UserError(
          f'{name} must be UTF-8 text, but its character {error.start + 1} '
          'stands for a byte that is not.'
        ) from error


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
  if not model_config.vocab_size:
    model_config = dataclasses.replace(
      model_config, vocab_size=tokenizer.vocab_size
    )
  prompt_ids = encode_prompt(tokenizer, request.prompt)
  arrivals, pieces = [time.monotonic()], []

  def tokens() -> Iterator[int]:
    for batch in generate_tokens(
      model_config,
      params,
      [prompt_ids],
      request.max_tokens,
      request.sampling,
      request.seed,
      on_reading,
    ):
      arrivals.append(time.monotonic())
      yield int(batch[0])

  for piece in stream_text(tokens(), tokenizer, prompt_ids, request.stop):
    pieces.append(piece)
    if write:
      write(piece)
  return Completion(
    text=''.join(pieces),
    num_tokens=len(arrivals) - 1,
    first_token_seconds=arrivals[1] - arrivals[0],
    seconds=arrivals[-1] - arrivals[1],
  )


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
  """The tokens of a prompt, which begins a document."""
  return [tokenizer.boundary_id, *tokenizer.encode(prompt).tolist()]


def stream_text(
  tokens: Iterable[int], tokenizer: Any, prompt_ids: list[int], stop: str = ''
) -> Iterator[str]:
  """Text of the tokens that follow a prompt, up to the document's end.

  Args:
    tokens: ids as they come; not read further than needed.
    tokenizer: whose `boundary_id` ends the document.
    prompt_ids: what stands before the first token.
    stop: a string that ends the text and is left out; '' for none.

  Yields:
    Whole characters. Those that may turn out to begin `stop` are held back
    until that is decided.
  """
  pieces = _token_bytes(tokens, tokenizer, prompt_ids)
  return until_stop(decode_utf8(pieces), stop)


def _token_bytes(
  tokens: Iterable[int], tokenizer: Any, prompt_ids: list[int]
) -> Iterator[bytes]:
  context = prompt_ids[-_SPELLING_CONTEXT:]
  for token in tokens:
    if token == tokenizer.boundary_id:
      return
    before = tokenizer.decode_bytes(context)
    yield tokenizer.decode_bytes([*context, token])[len(before) :]
    context = [*context, token][-_SPELLING_CONTEXT:]


def decode_utf8(pieces: Iterable[bytes]) -> Iterator[str]:
  """Whole characters; U+FFFD for what is no UTF-8."""
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  for piece in pieces:
    yield decoder.decode(piece)
  yield decoder.decode(b'', final=True)


def until_stop(texts: Iterable[str], stop: str) -> Iterator[str]:
  """The texts up to the first appearance of `stop`, also across their ends."""
  held = ''
  for text in texts:
    held += text
    if stop and stop in held:
      yield held[: held.index(stop)]
      return
    num_open = next(
      n for n in range(len(stop), -1, -1) if held.endswith(stop[:n])
    )
    certain = len(held) - num_open
    yield held[:certain]
    held = held[certain:]
  yield held
