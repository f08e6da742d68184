# SPDX-License-Identifier: Apache-2.0
"""Pairs and windows as lm-evaluation-harness makes them."""

import numpy as np
import pytest
import tokenizers
from scored_models import scorer

from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer, JsonTokenizer
from jaxsparse.evaluation.encoding import (
  continuation_of,
  encode_pair,
  rolling_windows,
)

BYTES = ByteTokenizer()
BEGIN = 256


def windows(count, window, stride=None):
  """Inputs and targets of a text of tokens 0, 1, ..."""
  tokens = np.array([BEGIN, *range(count)], np.int32)
  return [
    (w.tokens[:-1].tolist(), w.targets.tolist())
    for w in rolling_windows(tokens, window, stride)
  ]


def test_windows_of_ten_tokens():
  assert windows(10, 4) == [
    ([BEGIN, 0, 1, 2], [0, 1, 2, 3]),
    ([3, 4, 5, 6], [4, 5, 6, 7]),
    ([5, 6, 7, 8], [8, 9]),
  ]


@pytest.mark.parametrize('count', [1, 3, 4, 5, 9, 12])
@pytest.mark.parametrize('stride', [1, 2, 3, 4])
def test_each_token_is_scored_once(count, stride):
  found = windows(count, 4, stride)
  assert [t for _, targets in found for t in targets] == [*range(count)]
  assert all(len(inputs) <= 4 for inputs, _ in found)
  for inputs, targets in found[1:]:
    assert len(targets) <= stride
    assert len(inputs) == 4
    assert inputs[-1] == targets[-1] - 1


def test_a_stride_is_within_the_window():
  assert windows(0, 4) == []
  with pytest.raises(UserError, match='--stride must be within 1 and'):
    windows(10, 4, 5)


def pair(context, continuation, max_length=32, tokenizer=BYTES):
  found = encode_pair(tokenizer, context, continuation, max_length)
  return found.tokens.tolist(), found.num_targets, found.num_cut


def test_a_context_begins_a_document():
  assert pair('a', ' b') == ([BEGIN, *b'a b'], 2, 0)
  assert pair('', 'b') == ([BEGIN, *b'b'], 1, 0)


def test_spaces_at_the_end_of_a_context_are_scored():
  assert pair('a \n', 'b') == ([BEGIN, *b'a \nb'], 3, 0)


def test_a_long_context_is_cut_on_the_left():
  """And of the continuation all stays: inputs are one fewer."""
  assert pair('abcdef', 'xyz', 4) == ([*b'efxyz'], 3, 5)
  assert pair('abcdef', 'wxyz', 4) == ([*b'fwxyz'], 4, 6)


def merging_tokenizer():
  """With the tokens 'ab' and 'c' beside single letters."""
  vocab = {letter: i for i, letter in enumerate('abc')} | {'ab': 3}
  model = tokenizers.models.BPE(vocab=vocab, merges=[('a', 'b')])
  return JsonTokenizer(tokenizers.Tokenizer(model))


def test_a_border_within_a_token():
  """'a' and 'bc' are 'ab' and 'c': behind the one token of 'a' is 'c'."""
  tokenizer = merging_tokenizer()
  tokens, num_targets, _ = pair('a', 'bc', tokenizer=tokenizer)
  assert tokens == [tokenizer.boundary_id, 3, 2]
  assert num_targets == 1


@pytest.mark.parametrize(
  ('context', 'continuation', 'words'),
  [
    ('abc', '', ['no token of its own']),
    ('', '', ['no token of its own']),
    ('a', 'bcdefgh', ['7 tokens', 'than the 6', '--max-len']),
  ],
)
def test_what_cannot_be_scored_is_a_sentence(context, continuation, words):
  with pytest.raises(UserError) as raised:
    pair(context, continuation, 6)
  for word in words:
    assert word in str(raised.value)


def test_what_is_scored_has_the_spaces_before_it():
  assert continuation_of('a \n', ' b') == ' \n b'
  assert continuation_of('a', 'b') == 'b'


def test_a_rolling_text_is_the_sum_of_its_windows():
  """And one that fits is its log-likelihood after nothing."""
  of_model = scorer('dense', max_length=8)
  (short,) = of_model.rolling(['abcdefg'])
  assert short == pytest.approx(
    of_model.loglikelihoods([('', 'abcdefg')])[0].logprob, abs=1e-5
  )
  text = 'a text that is longer'
  (whole,) = of_model.rolling([text])
  tokens = np.array([BEGIN, *text.encode()], np.int32)
  parts = of_model.scores([*rolling_windows(tokens, 8)])
  assert len(parts) == 3
  assert whole == pytest.approx(sum(p.logprob for p in parts), abs=1e-6)
