# SPDX-License-Identifier: Apache-2.0
"""Every route's answer, byte for byte.

  python tests/serving/test_golden_answers.py

writes the answers anew; read what changes.
"""

import pathlib
import re

import pytest
from fake_engine import FakeEngine
from running import running

from jaxsparse.data.chat_template import ChatTemplate

GOLDEN = pathlib.Path(__file__).parent / 'golden_answers.txt'

TEMPLATE = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}'
  '{% endfor %}assistant:'
)
TEXT, CHAT = '/v1/completions', '/v1/chat/completions'
USAGE = {'include_usage': True}
SAID = [{'role': 'user', 'content': 'hi'}]

# Name -> method, path, body.
CASES = {
  'models': ('GET', '/v1/models', None),
  'model': ('GET', '/v1/models/tiny', None),
  'another model': ('GET', '/v1/models/../../etc/passwd', None),
  'health': ('GET', '/health', None),
  'tokenizer': ('GET', '/tokenizer_info', None),
  'tokenize': ('POST', '/tokenize', {'prompt': 'hé'}),
  'tokenize without boundary': (
    'POST',
    '/tokenize',
    {'prompt': 'hi', 'add_special_tokens': False},
  ),
  'tokenize the boundary': (
    'POST',
    '/tokenize',
    {'prompt': '<|endoftext|>', 'add_special_tokens': False},
  ),
  'detokenize': ('POST', '/detokenize', {'tokens': [256, 104, 255]}),
  'no route': ('GET', '/v2', None),
  'wrong method': ('GET', TEXT, None),
  'whole': ('POST', TEXT, {'prompt': 'abc', 'max_tokens': 5, 'seed': 0}),
  'new document': ('POST', TEXT, {'max_tokens': 2, 'temperature': 0}),
  'ids': (
    'POST',
    TEXT,
    {
      'prompt': [[104, 105], [106]],
      'max_tokens': 2,
      'temperature': 0,
      'n': 2,
      'return_token_ids': True,
    },
  ),
  'stream': (
    'POST',
    TEXT,
    {'prompt': 'abc', 'max_tokens': 2, 'seed': 0, 'stream': True},
  ),
  'stream of two with usage': (
    'POST',
    TEXT,
    {
      'prompt': 'abc',
      'max_tokens': 2,
      'seed': 0,
      'n': 2,
      'stream': True,
      'stream_options': USAGE,
    },
  ),
  'echo': (
    'POST',
    TEXT,
    {
      'prompt': [256, 97, 98],
      'max_tokens': 1,
      'logprobs': 1,
      'echo': True,
      'temperature': 0,
      'seed': 1234,
    },
  ),
  'score only': (
    'POST',
    TEXT,
    {'prompt': 'hé', 'max_tokens': 0, 'logprobs': 0, 'echo': True},
  ),
  'logprobs in a stream': (
    'POST',
    TEXT,
    {
      'prompt': 'ab',
      'max_tokens': 3,
      'seed': 0,
      'logprobs': 2,
      'stop': 'ba',
      'stream': True,
    },
  ),
  'echo in a stream': (
    'POST',
    TEXT,
    {
      'prompt': 'ab',
      'max_tokens': 2,
      'seed': 0,
      'logprobs': 1,
      'echo': True,
      'stream': True,
    },
  ),
  'end of the document': (
    'POST',
    TEXT,
    {'prompt': 'abcdef', 'max_tokens': 20, 'temperature': 0, 'logprobs': 1},
  ),
  'stop token': (
    'POST',
    TEXT,
    {
      'prompt': 'abc',
      'max_tokens': 20,
      'temperature': 0,
      'stop_token_ids': [99],
    },
  ),
  'bytes that are no UTF-8': (
    'POST',
    TEXT,
    {
      'prompt': [226, 130],
      'max_tokens': 1,
      'temperature': 0,
      'logprobs': 1,
      'echo': True,
    },
  ),
  'chat': ('POST', CHAT, {'messages': SAID, 'max_tokens': 4, 'seed': 0}),
  'chat with logprobs': (
    'POST',
    CHAT,
    {
      'messages': SAID,
      'max_completion_tokens': 1,
      'temperature': 0,
      'logprobs': True,
      'top_logprobs': 2,
    },
  ),
  'chat stream': (
    'POST',
    CHAT,
    {
      'messages': SAID,
      'max_tokens': 2,
      'seed': 0,
      'stream': True,
      'stream_options': USAGE,
    },
  ),
  'unknown field': ('POST', TEXT, {'prompt': 'a', 'max_token': 3}),
  'wrong type': ('POST', TEXT, {'prompt': 'a', 'temperature': 'hot'}),
  'out of range': ('POST', TEXT, {'prompt': 'a', 'temperature': -1}),
  'too long': ('POST', TEXT, {'prompt': 'a' * 64}),
  'wrong model': ('POST', TEXT, {'model': 'gpt-4', 'prompt': 'a'}),
}

# Headers that say when and where, and those of transport.
_PASSED_OVER = ('date', 'connection', 'content-length', 'transfer-encoding')


@pytest.fixture(scope='module')
def server():
  with running(
    FakeEngine(limit=64, eos_after=4), template=ChatTemplate(TEMPLATE)
  ) as found:
    yield found


def told(server, name):
  """The answer as the file has it: no two have the same id and time."""
  status, headers, content = server.request(*CASES[name])
  head = ''.join(
    f'{key.lower()}: {value}\n'
    for key, value in headers.items()
    if key.lower() not in _PASSED_OVER
  )
  text = f'{status}\n{head}\n{content.decode()}'
  text = re.sub(r'cmpl-[0-9a-f]{32}', 'cmpl-ID', text)
  return re.sub(r'"created":\d+', '"created":TIME', text)


def golden():
  parts = re.split(r'^=== (.*)\n', GOLDEN.read_text(), flags=re.MULTILINE)
  return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize('name', CASES)
def test_answers_are_those_of_the_file(server, name):
  assert told(server, name) + '\n' == golden()[name]


def test_ids_and_times_hold_for_a_whole_stream(server):
  content = server.request(*CASES['chat stream'])[2].decode()
  assert len(set(re.findall(r'chatcmpl-[0-9a-f]{32}', content))) == 1
  assert len(set(re.findall(r'"created":\d+', content))) == 1


def test_the_body_ends_at_done(server):
  content = server.request(*CASES['stream'])[2]
  assert content.endswith(b'}]}\n\ndata: [DONE]\n\n')


if __name__ == '__main__':
  with running(
    FakeEngine(limit=64, eos_after=4), template=ChatTemplate(TEMPLATE)
  ) as found:
    parts = [f'=== {name}\n{told(found, name)}\n' for name in CASES]
  GOLDEN.write_text(''.join(parts))
