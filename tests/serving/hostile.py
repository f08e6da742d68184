# SPDX-License-Identifier: Apache-2.0
"""Requests as nobody should send them, made from seeds."""

import json
import random
import socket

TEXT, CHAT = '/v1/completions', '/v1/chat/completions'
PATHS = (TEXT, CHAT, '/tokenize', '/detokenize')

# What a parser or a sampler may stumble over.
VALUES = (
  None,
  True,
  -1,
  257,
  2**31,
  2**63,
  10**400,
  -0.0,
  1e308,
  'a',
  '',
  '\0',
  '\U0001f600' * 10,
  [],
  [[]],
  [None],
  {},
  {'a': {}},
  {'1': 1e9},
  [1, 'a'],
)
FIELDS = (
  'prompt',
  'model',
  'n',
  'max_tokens',
  'temperature',
  'top_p',
  'top_k',
  'min_p',
  'seed',
  'stop',
  'stop_token_ids',
  'logprobs',
  'top_logprobs',
  'logit_bias',
  'stream',
  'stream_options',
  'echo',
  'best_of',
  'suffix',
  'presence_penalty',
  'frequency_penalty',
  'repetition_penalty',
  'min_tokens',
  'ignore_eos',
  'response_format',
  'guided_regex',
  'cache_salt',
  'messages',
  'tools',
  'tokens',
  'add_special_tokens',
)
# Of JSON that is none, or that no field may be.
WRONG = (
  b'',
  b'{',
  b'nul',
  b'{"n": NaN}',
  b'{"n": -Infinity}',
  b'{"n": 1e999}',
  b'{"n": 0x1}',
  b'{"prompt": "\\ud800"}',
  b'{"prompt": "\\u12"}',
  b'{"prompt": "\xed\xa0\x80"}',
  b'{"prompt": "\x01"}',
  b"{'prompt': 'a'}",
  b'\xef\xbb\xbf{}',
  b'{"prompt": "a",}',
  b'[' * 10_000,
  b'{"user":' * 10_000,
  b'{"user":' + b'[' * 100_000,
  b'{"prompt":[' + b'[' * 10_000,
)
# Built when they are sent: they are large.
HEAVY = (
  lambda: b'{"prompt":[' + b'"",' * 1_000_000 + b'""]}',
  lambda: b'{"prompt":[' + b'1,' * 2_000_000 + b'1]}',
  lambda: b'{"prompt":"' + b'a' * 4_000_000 + b'"}',
  lambda: b'{"prompt":"' + b'\\u00e9' * 600_000 + b'"}',
  lambda: b'{"stop":"' + b'a' * 1_000_000 + b'"}',
  lambda: b'{"prompt":"a","user":' + b'[' * 2_000_000,
  lambda: b'{"n":' + b'9' * 3_000_000 + b'}',
  lambda: b'{"' + b'x' * 3_000_000 + b'":1}',
  lambda: (
    b'{"logit_bias":{'
    + b','.join(b'"%d":1' % i for i in range(200_000))
    + b'}}'
  ),
  lambda: b' ' * (50 << 20),
)


def bodies(seed, count):
  """Paths and bodies, each of which must get a 4xx or be harmless."""
  chance = random.Random(seed)
  for _ in range(count):
    path = chance.choice(PATHS)
    if chance.random() < 0.3:
      yield path, chance.choice(WRONG)
      continue
    body = {'prompt': 'a', 'max_tokens': 2}
    if path == CHAT:
      body = {'messages': [{'role': 'user', 'content': 'a'}], 'max_tokens': 2}
    for _ in range(chance.randint(1, 4)):
      name = chance.choice(FIELDS)
      if chance.random() < 0.1:
        name += chance.choice('sx_ ')
      body[name] = chance.choice(VALUES)
    content = json.dumps(body).encode()
    if chance.random() < 0.2:
      content = bytearray(content)
      for _ in range(chance.randint(1, 5)):
        content[chance.randrange(len(content))] = chance.randrange(256)
      content = bytes(content)
    yield path, content


def raw(seed):
  """Bytes as they go into a socket, and whether the sender then half-closes."""
  chance = random.Random(seed)
  head = b'POST /v1/completions HTTP/1.1\r\nhost: x\r\n'
  json_head = head + b'content-type: application/json\r\n'
  kinds = (
    lambda: chance.randbytes(chance.randint(1, 2000)),
    lambda: b'GET / HTTP/9.9\r\n\r\n',
    lambda: b'GET ' + b'/a' * 40_000 + b' HTTP/1.1\r\nhost: x\r\n\r\n',
    lambda: head + b'x: ' + b'a' * 100_000 + b'\r\n\r\n',
    lambda: head + b''.join(b'x%d: y\r\n' % i for i in range(9000)) + b'\r\n',
    lambda: head + b'content-length: -1\r\n\r\n',
    lambda: head + b'content-length: 1\r\ncontent-length: 2\r\n\r\n{',
    lambda: json_head + b'content-length: ' + b'9' * 30 + b'\r\n\r\n{',
    lambda: json_head + b'transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n',
    lambda: json_head + b'transfer-encoding: gzip\r\n\r\n{}',
    lambda: json_head + b'content-length: 50\r\n\r\n{"prompt"',
    lambda: b'POST /v1/completions\r\n\r\n',
    lambda: b'\r\n\r\n\r\n',
    lambda: b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
    lambda: b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
    lambda: b'CONNECT elsewhere:80 HTTP/1.1\r\nhost: x\r\n\r\n',
    lambda: b'GET /%00%ff%c0 HTTP/1.1\r\nhost: x\r\n\r\n',
    lambda: head + b'expect: 100-continue\r\ncontent-length: 2\r\n\r\n',
    lambda: (
      b'GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n'
      b'connection: upgrade\r\n\r\n'
    ),
  )
  return chance.choice(kinds)(), chance.random() < 0.5


def poke(port, content, half_closes, seconds):
  """Sends bytes; what comes back within some time."""
  with socket.create_connection(('127.0.0.1', port), timeout=seconds) as peer:
    found = b''
    try:
      peer.sendall(content)
      if half_closes:
        peer.shutdown(socket.SHUT_WR)
      while part := peer.recv(1 << 16):
        found += part
    except OSError:
      pass
    return found
