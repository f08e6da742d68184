# SPDX-License-Identifier: Apache-2.0
"""Programs without a device: a "model" that hashes what it has read."""

import dataclasses
import time
import zlib

import numpy as np

VOCAB_SIZE, BOUNDARY = 257, 256
CHUNK, LENGTH = 8, 96


def next_token(tokens, seed):
  """What the model draws after tokens: a letter, or the document's end."""
  content = np.asarray([*tokens, seed], '<i4').tobytes()
  number = zlib.crc32(content) % 40
  return BOUNDARY if number == 39 else 97 + number % 26


def logprobs_of(tokens):
  """Log-probabilities of all tokens after these, float32 [V]."""
  rng = np.random.default_rng(zlib.crc32(np.asarray(tokens, '<i4').tobytes()))
  logits = rng.normal(size=VOCAB_SIZE)
  return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


@dataclasses.dataclass(eq=False)
class Snapshot:
  tokens: tuple
  num_bytes: int

  @property
  def parts(self):
    return (self,)

  @property
  def length(self):
    return len(self.tokens)


@dataclasses.dataclass
class Drawn:
  tokens: np.ndarray
  logprob: np.ndarray | None = None
  top_ids: np.ndarray | None = None
  top_logprobs: np.ndarray | None = None
  prompt_logprob: np.ndarray | None = None
  prompt_top_ids: np.ndarray | None = None
  prompt_top_logprobs: np.ndarray | None = None


class Pending:
  def __init__(self, drawn, seconds):
    self._drawn, self._seconds = drawn, seconds

  def result(self):
    time.sleep(self._seconds)
    return self._drawn

  def is_ready(self):
    return not self._seconds


class FakePrograms:
  """Refuses every call that real programs would take for something else."""

  # Of adapters.
  places = sight = None

  num_compiled, chunks, vocab_size = 12, (CHUNK, 4), VOCAB_SIZE
  length = LENGTH

  def __init__(self, num_slots=3, seconds=0.0, fails_at=None):
    self.num_slots, self.seconds, self.fails_at = num_slots, seconds, fails_at
    # What each slot has been fed, and the token that it feeds next.
    self.fed = [[7, 7, 7] for _ in range(num_slots)]
    self.following = [None] * num_slots
    self.seeds = [None] * num_slots
    # Names of calls in their order, with what the tests ask about.
    self.calls = []

  def start(self, slot, sampling, place=0):
    self._called('start', slot)
    self.fed[slot], self.following[slot] = [], None
    self.seeds[slot] = sampling.seed

  def prefill(self, slot, tokens, is_last, form, mask=None):
    self._called('prefill', slot)
    return self._pending(slot, self._read(slot, tokens, is_last, form, mask))

  def score(self, slot, tokens, targets, is_last, form, mask=None):
    self._called('score', slot)
    begin = len(self.fed[slot])
    drawn = self._read(slot, tokens, is_last, form, mask)
    rows = [
      logprobs_of(self.fed[slot][: begin + i + 1]) for i in range(len(tokens))
    ]
    drawn.prompt_logprob = np.array(
      [x[t] for x, t in zip(rows, targets, strict=True)]
    )
    tops = [np.argsort(-x)[:20] for x in rows]
    drawn.prompt_top_ids = np.array(tops)
    drawn.prompt_top_logprobs = np.array(
      [x[t] for x, t in zip(rows, tops, strict=True)]
    )
    return self._pending(slot, drawn)

  def decode(self, is_live, form, mask):
    assert is_live.dtype == bool
    assert is_live.any()
    slots = np.flatnonzero(is_live).tolist()
    self._called('decode', tuple(slots))
    drawn = self._blank(form)
    for slot in slots:
      self.fed[slot].append(self.following[slot])
      self._draw(drawn, slot, None if mask is None else mask[slot])
    return self._pending(slots[0], drawn)

  def snapshot(self, slot):
    self._called('snapshot', slot)
    assert len(self.fed[slot]) % CHUNK == 0
    return Snapshot(tuple(self.fed[slot]), 10 * len(self.fed[slot]))

  def insert(self, slot, snapshot):
    self._called('insert', slot)
    assert not self.fed[slot]
    self.fed[slot] = list(snapshot.tokens)

  def _read(self, slot, tokens, is_last, form, mask):
    assert tokens.dtype == np.int32
    assert 1 <= len(tokens) <= CHUNK
    assert len(self.fed[slot]) % CHUNK == 0
    assert self.following[slot] is None
    self.fed[slot] += tokens.tolist()
    drawn = self._blank(form)
    if is_last:
      self._draw(drawn, slot, mask)
    return drawn

  def _blank(self, form):
    drawn = Drawn(np.full(self.num_slots, -1, np.int32))
    if form == 'logprobs':
      drawn.logprob = np.full(self.num_slots, np.nan, np.float32)
      drawn.top_ids = np.zeros((self.num_slots, 20), np.int32)
      drawn.top_logprobs = np.full((self.num_slots, 20), np.nan, np.float32)
    return drawn

  def _draw(self, drawn, slot, mask):
    assert len(self.fed[slot]) < LENGTH
    token = next_token(self.fed[slot], self.seeds[slot])
    if mask is not None:
      allowed = np.flatnonzero(
        np.unpackbits(mask.view(np.uint8), bitorder='little')
      )
      token = int(allowed[token % len(allowed)])
    self.following[slot] = drawn.tokens[slot] = token
    if drawn.logprob is not None:
      scores = logprobs_of(self.fed[slot])
      drawn.logprob[slot] = scores[token]
      drawn.top_ids[slot] = np.argsort(-scores)[:20]
      drawn.top_logprobs[slot] = scores[drawn.top_ids[slot]]

  def _called(self, name, what):
    self.calls.append((name, what))
    if self.fails_at == len(self.calls):
      raise RuntimeError('the device is gone')

  def _pending(self, slot, drawn):
    return Pending(drawn, self.seconds)
