# SPDX-License-Identifier: Apache-2.0
"""Several texts at once, on the programs of slots.

The programs depend on the model and on how many tokens there is room for, not
on the prompts: where compiled programs are kept, a prompt of another length
compiles nothing.
"""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference.decoding import check_room
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.long_input import Reading, chunk_size
from jaxsparse.inference.sight import Sight
from jaxsparse.inference.slot_model import SlotModel
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.inference.slot_results import Pending, Snapshot
from jaxsparse.inference.text import (
  Completion,
  Request,
  TextStream,
  encode_prompt,
)

# Texts at once, at most.
_MOST_SLOTS = 8
# Shorter chunks, for what is left of a prompt.
_SHORTER = (128, 16)


def prepare(
  model_config: ModelConfig,
  params: dict,
  tokenizer: Any,
  requests: Sequence[Request],
  length: int,
  sight: Sight | None = None,
) -> Programs:
  """Programs with room for as many of the texts at once as memory has.

  Args:
    model_config: with vocab_size set; with a bounded history `length` is of no
      matter.
    params: its parameters.
    tokenizer: with which it was trained.
    requests: the texts.
    length: tokens for which there is room at least, such as those of training:
      all shorter texts have the same programs.
    sight: of pictures.

  Raises:
    UserError: memory has no room for the longest text.
  """
  sizes = [
    (len(encode_prompt(tokenizer, r.prompt)), r.max_tokens, r.sampling)
    for r in requests
  ]
  longest = max(sizes, key=lambda size: size[0] + size[1])
  seen = SlotModel(model_config, sight and sight.settings).rows_before
  num_slots = min(len(requests), _MOST_SLOTS)
  while True:
    try:
      check_room(
        model_config, params, num_slots, seen + longest[0], *longest[1:]
      )
      break
    except UserError:
      if num_slots == 1:
        raise
      num_slots //= 2
  chunk, needed = chunk_size(model_config), longest[0] + longest[1]
  if needed > length:
    length = -(-needed // chunk) * chunk
  return Programs.compile(
    model_config,
    params,
    num_slots,
    length,
    chunks=(chunk, *(n for n in _SHORTER if n < chunk)),
    stop_ids=tokenizer.stop_ids,
    is_lazy=True,
    sight=sight,
  )


class _Text:
  """One text on its way."""

  def __init__(self, number: int, request: Request, tokenizer: Any):
    self.number, self.request = number, request
    self.prompt = encode_prompt(tokenizer, request.prompt)
    self.sampling = JobSampling(
      temperature=request.sampling.temperature,
      top_k=request.sampling.top_k,
      top_p=request.sampling.top_p,
      seed=request.seed,
    )
    self.is_done, self.num_asked, self.num_tokens = False, 0, 0
    self._stop_ids = tokenizer.stop_ids
    self._stream = TextStream(tokenizer, self.prompt, request.stop)
    self._pieces: list[str] = []
    self._start, self._times = time.monotonic(), (0.0, 0.0)

  def feed(self, token: int) -> str:
    """Text that is certain by this token; it may be the last one."""
    now = time.monotonic()
    self._times = (self._times[0] if self.num_tokens else now, now)
    self.num_tokens += 1
    is_end, piece = token in self._stop_ids, ''
    if not is_end:
      piece = self._stream.feed(token)
    self.is_done = (
      is_end
      or self._stream.stop_found is not None
      or self.num_tokens == self.request.max_tokens
    )
    if self.is_done:
      piece += self._stream.finish()
    self._pieces.append(piece)
    return piece

  def completion(self) -> Completion:
    first, last = self._times
    return Completion(
      text=''.join(self._pieces),
      num_tokens=self.num_tokens,
      first_token_seconds=first - self._start,
      seconds=last - first,
    )


def complete_all(
  programs: Programs,
  tokenizer: Any,
  requests: Sequence[Request],
  write: Callable[[int, str], Any] = lambda number, text: None,
  finish: Callable[[int, Completion], Any] = lambda number, done: None,
  on_reading: Callable[[Reading], None] = lambda reading: None,
  picture: np.ndarray | None = None,
) -> list[Completion]:
  """Continues all prompts; a text depends on its own request only.

  Prompts that follow one another and are alike are read once, but with a
  picture.

  Args:
    programs: of `prepare`.
    tokenizer: with which the model was trained.
    requests: what to continue and how.
    write: called with the number of a text and each piece of it.
    finish: called with the number of a text that is complete.
    on_reading: called as long prompts are read, chunk by chunk.
    picture: that all texts are about, uint8 [S, S, 3].
  """
  waiting = collections.deque(
    _Text(i, request, tokenizer) for i, request in enumerate(requests)
  )
  reader = _Reader(programs, on_reading, picture)
  in_slot: dict[int, _Text] = {}
  on_way: collections.deque[tuple[Pending, dict[int, _Text]]] = (
    collections.deque()
  )
  done: dict[int, Completion] = {}

  def deliver(most_left: int) -> None:
    while len(on_way) > most_left:
      pending, texts = on_way.popleft()
      tokens = pending.result().tokens
      for slot, text in texts.items():
        if text.is_done:
          continue
        write(text.number, text.feed(int(tokens[slot])))
        if text.is_done:
          in_slot.pop(slot)
          done[text.number] = text.completion()
          finish(text.number, done[text.number])

  while waiting or in_slot:
    for slot in range(programs.num_slots):
      if slot not in in_slot and waiting:
        text = in_slot[slot] = waiting.popleft()
        on_way.append((reader.read(slot, text), {slot: text}))
        text.num_asked = 1
    live = {
      slot: text
      for slot, text in in_slot.items()
      if text.num_asked < text.request.max_tokens
    }
    if live:
      is_live = np.isin(np.arange(programs.num_slots), list(live))
      forms = {text.sampling.form for text in live.values()}
      form = 'sorted' if 'sorted' in forms else 'plain'
      on_way.append((programs.decode(is_live, form), live))
      for text in live.values():
        text.num_asked += 1
    # The device has the next step before the host waits for this one.
    deliver(1 if live else 0)
  deliver(0)
  return [done[i] for i in range(len(requests))]


class _Reader:
  """Reads prompts, and remembers how far the last one was alike."""

  def __init__(
    self,
    programs: Programs,
    on_reading: Callable[[Reading], None],
    picture: np.ndarray | None,
  ):
    self._programs, self._on_reading = programs, on_reading
    self._picture = picture
    self._prompt: np.ndarray | None = None
    self._snapshot: Snapshot | None = None

  def read(self, slot: int, text: _Text) -> Pending:
    """Reads all of a prompt; what the slot draws first."""
    programs, prompt = self._programs, text.prompt
    size = programs.chunks[0]
    last = (len(prompt) - 1) // size * size
    programs.start(slot, text.sampling)
    if self._picture is not None:
      programs.see(slot, self._picture)
    if last and np.array_equal(prompt, self._prompt):
      programs.insert(slot, self._snapshot)
    elif last:
      self._read_chunks(slot, prompt, last, size)
    return programs.prefill(slot, prompt[last:], is_last=True)

  def _read_chunks(self, slot, prompt, last, size):
    programs, pending = self._programs, collections.deque()
    for begin in range(0, last, size):
      part = prompt[begin : begin + size]
      targets = prompt[begin + 1 : begin + size + 1]
      scores = programs.score(slot, part, targets, is_last=False)
      pending.append((begin, scores))
      # The next chunk runs while the host waits for this one.
      while len(pending) > (begin + size < last):
        self._tell(size, *pending.popleft())
    if self._picture is None:
      self._prompt, self._snapshot = prompt, programs.snapshot(slot)

  def _tell(self, size, begin, pending):
    nats = -float(pending.result().prompt_logprob.mean())
    self._on_reading(Reading(begin, begin + size, nats))
