# SPDX-License-Identifier: Apache-2.0
"""Texts that match a JSON schema or a regular expression, by llguidance.

What it takes to say which tokens may come next is not bounded by the size of a
grammar. Everything here but the masks themselves is for threads that nobody
waits for.
"""

import dataclasses
import json
import threading
from typing import Any, Literal, Self

import numpy as np

from jaxsparse.config.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Grammar:
  """What a text has to match."""

  kind: Literal['json_object', 'json_schema', 'regex']
  # The schema as JSON, or the expression; nothing for any object.
  text: str = ''


def check(grammar: Grammar) -> None:
  """Refuses what is no grammar; may take long.

  Raises:
    UserError: it is none, or llguidance is not installed.
  """
  message = _llguidance().LLMatcher.validate_grammar(_source(grammar))
  if message and not message.startswith('WARNING'):
    reason = ' '.join(message.split())[:200]
    raise UserError(f'{grammar.kind} must be a grammar, but: {reason}.')


class Guide:
  """Where one text stands in its grammar.

  Attributes:
    mask: uint32 [ceil(V / 32)], a bit for each token that may come next, of
      token i the bit i mod 32 of word i // 32.
    is_over: whether nothing but the end may come.
  """

  def __init__(self, matcher: Any):
    self._matcher = matcher
    self._look()

  def advance(self, token: int) -> Self:
    """Goes on by a token that the mask has allowed.

    Raises:
      ValueError: the grammar can't be followed any further.
    """
    self._matcher.consume_token(token)
    self._look()
    return self

  def _look(self) -> None:
    matcher = self._matcher
    self.is_over = matcher.is_stopped()
    self.mask = np.frombuffer(matcher.compute_bitmask(), '<u4')
    if matcher.is_error():
      reason = matcher.get_error().split('<state>')[0]
      if 'NoExtensionBias' in reason:
        reason = "none of this model's tokens can come next"
      raise ValueError(' '.join(reason.split())[:200])


class Guides:
  """Beginnings of texts in the tokens of one model.

  Args:
    tokenizer: of the model.
    vocab_size: of the model, no less than the tokenizer's.
  """

  def __init__(self, tokenizer: Any, vocab_size: int):
    self._tokenizer, self._vocab_size = tokenizer, vocab_size
    self._spelled: Any = None
    self._lock = threading.Lock()

  def start(self, grammar: Grammar) -> Guide:
    """The guide of a new text; the first one takes longest.

    Raises:
      ValueError: there is no such grammar, or it is too complex.
    """
    with self._lock:
      if self._spelled is None:
        self._spelled = _spell(self._tokenizer, self._vocab_size)
    matcher = _llguidance().LLMatcher(
      self._spelled, _source(grammar), log_level=0
    )
    return Guide(matcher)


def _llguidance() -> Any:
  try:
    import llguidance
  except ImportError as error:
    raise UserError(
      'grammars need llguidance, which is not installed: '
      "pip install 'jaxsparse[grammar]'."
    ) from error
  return llguidance


def _source(grammar: Grammar) -> str:
  matcher = _llguidance().LLMatcher
  if grammar.kind == 'regex':
    return matcher.grammar_from_regex(grammar.text)
  schema = '{"type": "object"}' if grammar.kind == 'json_object' else None
  try:
    content = json.loads(schema or grammar.text)
    if not isinstance(content, dict | bool):
      raise ValueError('it is no object')
    return matcher.grammar_from_json_schema(json.dumps(content))
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'json_schema must be a JSON schema, got {shown(grammar.text)}: {error}.'
    ) from error


def _spell(tokenizer: Any, vocab_size: int) -> Any:
  """The tokens' bytes as llguidance wants them."""
  llguidance = _llguidance()
  wrapped = llguidance.TokenizerWrapper(_Tokens(tokenizer, vocab_size))
  return llguidance.LLTokenizer(wrapped, n_vocab=vocab_size)


class _Tokens:
  """A tokenizer by the names that llguidance asks for."""

  bos_token_id = None

  def __init__(self, tokenizer: Any, vocab_size: int):
    self._tokenizer = tokenizer
    # At a text's beginning some tokens lack their space, or are another one.
    self._context = [int(x) for x in tokenizer.encode('a')]
    num_known = min(vocab_size, tokenizer.vocab_size)
    self.tokens = [self._spelled([i]) for i in range(num_known)]
    self.tokens += [b''] * (vocab_size - num_known)
    self.eos_token_id = tokenizer.stop_ids[0]
    silent = {*tokenizer.stop_ids, tokenizer.begin_id}
    special = silent | set(tokenizer.markers.values())
    # Of these no text is made, whatever they are called.
    self.special_token_ids = [i for i in special if i < num_known]
    for i in self.special_token_ids:
      self.tokens[i] = b'<end>' if i == self.eos_token_id else b'<%d>' % i

  def __call__(self, text: str) -> list[int]:
    """Tokens of what the grammar leaves no choice about, or the first ones."""
    if not isinstance(text, str):
      raise TypeError('text must be a string')
    both = [int(x) for x in self._tokenizer.encode('a' + text)]
    size = len(self._context)
    if both[:size] == self._context:
      ids = both[size:]
      if self._spelled(ids) == text.encode():
        return ids
    # By the longest tokens that spell it.
    content, ids = text.encode(), []
    while content:
      found = max(
        (
          i
          for i, x in enumerate(self.tokens)
          if x and content.startswith(x) and i not in self.special_token_ids
        ),
        key=lambda i: len(self.tokens[i]),
        default=None,
      )
      if found is None:
        break
      ids.append(found)
      content = content[len(self.tokens[found]) :]
    return ids

  def _spelled(self, ids: list[int]) -> bytes:
    """Bytes of tokens that others stand before."""
    spell = self._tokenizer.decode_bytes
    return spell([*self._context, *ids])[len(spell(self._context)) :]
