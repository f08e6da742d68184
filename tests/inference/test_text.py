"""Characters and stop strings across tokens."""

import pytest

from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.errors import UserError
from jaxsparse.inference.text import (
  Completion,
  Request,
  decode_utf8,
  encode_prompt,
  stream_text,
  until_stop,
)

TOKENIZER = ByteTokenizer()


def test_a_character_is_written_when_it_is_whole():
  content = 'aé€😀'.encode()
  pieces = list(decode_utf8(content[i : i + 1] for i in range(len(content))))
  assert pieces == ['a', '', 'é', '', '', '€', '', '', '', '😀', '']


def test_what_is_no_utf8_is_marked():
  assert ''.join(decode_utf8([b'a\xff', b'b\xe2\x82'])) == 'a\ufffdb\ufffd'


@pytest.mark.parametrize(
  ('text', 'stop', 'expected'),
  [
    ('abcd', '', 'abcd'),
    ('abcd', 'x', 'abcd'),
    ('abcd', 'bc', 'a'),
    ('abcd', 'a', ''),
    ('abcd', 'cde', 'abcd'),
    ('aaab', 'aab', 'a'),
    ('ababac', 'abac', 'ab'),
    ('end\n\nmore', '\n\n', 'end'),
  ],
)
def test_stop_strings_at_any_cut(text, stop, expected):
  for size in range(1, len(text) + 1):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert ''.join(until_stop(parts, stop)) == expected


def test_nothing_of_a_stop_string_is_ever_written():
  assert list(until_stop(['x\n', '\n', 'y'], '\n\n')) == ['x', '']
  assert list(until_stop(['x\n', 'y'], '\n\n')) == ['x', '\ny', '']


def test_reading_ends_with_the_stop_string_and_with_the_document():
  tokens = iter(b'ab--cd')
  assert ''.join(stream_text(tokens, TOKENIZER, [256], '--')) == 'ab'
  assert bytes(tokens) == b'cd'
  tokens = iter([97, TOKENIZER.boundary_id, 98])
  assert ''.join(stream_text(tokens, TOKENIZER, [256])) == 'a'
  assert list(tokens) == [98]


class SpacingTokenizer:
  """Words; a text's first one stands without the space before it."""

  boundary_id = 0
  words = ('', 'a', 'b')

  def decode_bytes(self, ids):
    return ' '.join(self.words[i] for i in ids if i).encode()


def test_spaces_between_tokens_survive():
  pieces = stream_text([1, 2, 1], SpacingTokenizer(), [0, 1])
  assert ''.join(pieces) == ' a b a'


def test_a_prompt_begins_a_document():
  assert encode_prompt(TOKENIZER, '') == [256]
  assert encode_prompt(TOKENIZER, 'é') == [256, 0xC3, 0xA9]


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('max_tokens', 0),
    ('seed', -1),
    ('seed', 2**32),
    ('prompt', 'ab\udcff'),
    ('stop', '\udc80'),
  ],
)
def test_requests_are_checked(field, value):
  with pytest.raises(UserError, match=f'^{field} must') as caught:
    Request(**{field: value})
  str(caught.value).encode()


def test_the_rate_leaves_the_first_token_out():
  times = dict(first_token_seconds=9.0, seconds=2.0)
  assert Completion(text='', num_tokens=3, **times).tokens_per_second == 1.0
  assert Completion(text='', num_tokens=1, **times).tokens_per_second == 0.0
