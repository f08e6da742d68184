# SPDX-License-Identifier: Apache-2.0
"""Characters and stop strings across tokens."""

import codecs

import numpy as np
import pytest

from jaxsparse.analysis import free_memory
from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.inference.text import (
  Completion,
  Request,
  TextStream,
  decode_utf8,
  encode_prompt,
  read_file,
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
    ('abcd', (), 'abcd'),
    ('abcd', ('x',), 'abcd'),
    ('abcd', ('bc',), 'a'),
    ('abcd', ('a',), ''),
    ('abcd', ('cde',), 'abcd'),
    ('aaab', ('aab',), 'a'),
    ('ababac', ('abac',), 'ab'),
    ('end\n\nmore', ('\n\n',), 'end'),
    ('abcd', ('d', 'b'), 'a'),
    # The one that begins first, though another is whole before it.
    ('abcd', ('c', 'bcd'), 'a'),
    ('abce', ('c', 'bcd'), 'ab'),
    ('abc', ('c', 'bcd'), 'ab'),
  ],
)
def test_stop_strings_at_any_cut(text, stop, expected):
  for size in range(1, len(text) + 1):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert ''.join(until_stop(parts, stop)) == expected


def test_any_stop_strings_cut_as_the_whole_text_would_be():
  rng = np.random.default_rng(0)
  for _ in range(2000):
    text = ''.join(rng.choice(list('ab\n'), size=rng.integers(12)))
    stop = tuple(
      ''.join(rng.choice(list('ab\n'), size=rng.integers(1, 5)))
      for _ in range(rng.integers(4))
    )
    begins = [text.index(s) for s in stop if s in text]
    cuts = np.sort(rng.integers(len(text) + 1, size=3)).tolist()
    parts = [
      text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)
    ]
    expected = text[: min(begins, default=len(text))]
    assert ''.join(until_stop(parts, stop)) == expected, (text, stop, parts)


def test_nothing_of_a_stop_string_is_ever_written():
  stop = ('\n\n', 'z')
  assert list(until_stop(['x\n', '\n', 'y'], stop)) == ['x', '']
  assert list(until_stop(['x\n', 'y'], stop)) == ['x', '\ny', '']


def test_a_file_is_read_as_training_reads_it(tmp_path):
  """Ends of lines stay as they are; a byte order mark is none of the text."""
  path = tmp_path / 'text.txt'
  for content in (b'a\r\nb\rc\n', b'', 'ü\u2028\ufeff'.encode()):
    for mark in (b'', b'\xef\xbb\xbf'):
      path.write_bytes(mark + content)
      assert read_file('--prompt_file=', str(path)).encode() == content


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'ab\xff', 'its byte 2 is not'),
    (b'\xef\xbb\xbfab\xff', 'its byte 5 is not'),
    (None, "can't be read"),
  ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, words):
  path = tmp_path / 'text.txt'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=f'^--prompt_file=.*{words}'):
    read_file('--prompt_file=', str(path))
  with pytest.raises(UserError, match="can't be read"):
    read_file('--prompt_file=', f'{path}\0')


def test_a_file_beyond_memory_is_not_read_to_its_end(monkeypatch):
  monkeypatch.setattr(free_memory, 'of_host', lambda: 2**26)
  with pytest.raises(UserError, match=r'/dev/zero is longer than the 8\.0 MiB'):
    read_file('--prompt_file=', '/dev/zero')


def test_reading_ends_with_the_stop_string_and_with_the_document():
  tokens = iter(b'ab--cd')
  assert ''.join(stream_text(tokens, TOKENIZER, [256], ('--',))) == 'ab'
  assert bytes(tokens) == b'cd'
  tokens = iter([97, TOKENIZER.boundary_id, 98])
  assert ''.join(stream_text(tokens, TOKENIZER, [256])) == 'a'
  assert list(tokens) == [98]


def test_any_of_its_ends_ends_a_text():
  class Chatty(ByteTokenizer):
    stop_ids = (65, 256)

  for end in Chatty.stop_ids:
    tokens = iter([97, end, 98])
    assert ''.join(stream_text(tokens, Chatty(), [256])) == 'a'
    assert list(tokens) == [98]


class SpacingTokenizer:
  """Words; a text's first one stands without the space before it."""

  stop_ids = (0,)
  words = ('', 'a', 'b')

  def decode_bytes(self, ids):
    return ' '.join(self.words[i] for i in ids if i).encode()


def test_spaces_between_tokens_survive():
  pieces = stream_text([1, 2, 1], SpacingTokenizer(), [0, 1])
  assert ''.join(pieces) == ' a b a'


def test_a_prompt_begins_a_document():
  assert encode_prompt(TOKENIZER, '').tolist() == [256]
  assert encode_prompt(TOKENIZER, 'é').tolist() == [256, 0xC3, 0xA9]


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('max_tokens', 0),
    ('seed', -1),
    ('seed', 2**32),
    ('prompt', 'ab\udcff'),
    ('stop', ('a', '\udc80')),
    ('stop', ('a', '')),
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


def test_tokens_of_any_bytes_are_cut_as_their_whole_text_is():
  """And a token begins in the text where its bytes do, or their character."""
  rng = np.random.default_rng(1)
  alphabet = np.frombuffer('aé\n€'.encode() + b'\xff', np.uint8)
  for _ in range(1000):
    tokens = rng.choice(alphabet, rng.integers(1, 14)).tolist()
    whole = TOKENIZER.decode(tokens)
    stop = tuple(
      {''.join(rng.choice(list('aé\n€'), rng.integers(1, 4))) for _ in 'ab'}
    )
    ends = {whole.index(s): s for s in sorted(stop, reverse=True) if s in whole}
    end = min(ends, default=len(whole))
    for include in (False, True):
      stream = TextStream(TOKENIZER, [256], stop, include)
      pieces = []
      for i, token in enumerate(tokens):
        # Bytes of a character that is not whole yet count nowhere.
        assert stream.num_chars == _num_decided(tokens[:i])
        pieces.append(stream.feed(token))
        if stream.stop_found is not None:
          break
      pieces.append(stream.finish())
      text = ''.join(pieces)
      if not ends:
        assert text == whole
        assert stream.stop_found is None
        continue
      assert stream.feed(97) == stream.finish() == ''
      assert stream.stop_found in stop
      assert whole.startswith(stream.stop_found, end)
      assert text == whole[:end] + (stream.stop_found if include else '')


def _num_decided(tokens):
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  return len(decoder.decode(bytes(tokens)))
