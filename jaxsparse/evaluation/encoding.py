# SPDX-License-Identifier: Apache-2.0
"""From pairs and long texts to what is scored: as lm-evaluation-harness does.

Every text begins a document: the tokenizer's begin token stands before it. So
an empty context is that token alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxsparse.config.errors import UserError, shown
from jaxsparse.inference.text import encode_prompt


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Tokens of which the last are scored, each given all before it.

  Attributes:
    tokens: int32 [n + 1]; the model reads all but the last one.
    num_targets: how many of the last are scored, from 1 to n.
    num_cut: tokens of the context that were cut off on the left.
  """

  tokens: np.ndarray
  num_targets: int
  num_cut: int = 0

  @property
  def length(self) -> int:
    """Tokens that the model reads."""
    return len(self.tokens) - 1

  @property
  def targets(self) -> np.ndarray:
    return self.tokens[-self.num_targets :]


def continuation_of(context: str, continuation: str) -> str:
  """What is scored: spaces at the end of the context are, too."""
  return context[len(context.rstrip()) :] + continuation


def encode_pair(
  tokenizer: Any, context: str, continuation: str, max_length: int
) -> Encoded:
  """A continuation to be scored after its context.

  Spaces at the end of the context belong to the continuation, and its tokens
  are those of both together behind those of the context: a border may lie
  within a token of the continuation alone. A context that is too long loses
  tokens on the left; the continuation stays whole.

  Args:
    tokenizer: of the model.
    context: may be empty.
    continuation: what is scored.
    max_length: tokens that the model reads at most.

  Raises:
    UserError: the continuation has no token of its own, or more than the model
      reads.
  """
  stripped = context.rstrip()
  continuation = continuation_of(context, continuation)
  whole = encode_prompt(tokenizer, stripped + continuation)
  num_context = len(encode_prompt(tokenizer, stripped))
  num_targets = len(whole) - num_context
  if num_targets < 1:
    raise UserError(
      f'the continuation {shown(continuation)} has no token of its own behind '
      'its context: give it some text.'
    )
  if num_targets > max_length:
    raise UserError(
      f'the continuation {shown(continuation)} has {num_targets} tokens, more '
      f'than the {max_length} that the model reads: raise --max-len or leave '
      'it out.'
    )
  kept = whole[-(max_length + 1) :]
  return Encoded(kept, num_targets, len(whole) - len(kept))


def rolling_windows(
  tokens: np.ndarray, window: int, stride: int | None = None
) -> Iterator[Encoded]:
  """Windows in which each token of a long text is scored once.

  Args:
    tokens: int32 [n + 1] of a text, its begin token first; that one is not
      scored.
    window: tokens that the model reads at once.
    stride: tokens that a window scores at most, all but the first one; by
      default as many as it reads. The last one scores what is left, with as
      much before it as fits.

  Raises:
    UserError: the window or the stride is not valid.
  """
  stride = window if stride is None else stride
  if not 1 <= stride <= window:
    raise UserError(
      f'--stride must be within 1 and --window={window}, got {stride}.'
    )
  num_scored, num_tokens, most = 0, len(tokens) - 1, window
  while num_scored < num_tokens:
    num_targets = min(num_tokens - num_scored, most)
    end = num_scored + num_targets + 1
    yield Encoded(tokens[max(0, end - window - 1) : end], num_targets)
    num_scored, most = num_scored + num_targets, stride
