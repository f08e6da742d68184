# SPDX-License-Identifier: Apache-2.0
"""Requests that are refused: each in a sentence that names the field."""

import json

import pytest
from fake_engine import FakeEngine
from running import running

from jaxsparse.inference import jobs
from jaxsparse.serving import errors, options

TEXT, CHAT = '/v1/completions', '/v1/chat/completions'

# Field, value, part of the sentence.
FIELDS = [
  ('temperature', -0.1, 'within 0 and 100'),
  ('temperature', 1e-9, '0 or at least'),
  ('top_p', 0, 'above 0'),
  ('top_p', 1.5, 'within 0 and 1'),
  ('top_k', -2, 'within -1'),
  ('min_p', 2, 'within 0 and 1'),
  ('repetition_penalty', 0, 'within 0.01 and 100'),
  ('presence_penalty', 3, 'within -2 and 2'),
  ('frequency_penalty', -3, 'within -2 and 2'),
  ('seed', -1, 'within 0 and 4,294,967,295'),
  ('seed', 2**32, 'within 0 and 4,294,967,295'),
  ('n', 0, 'within 1 and 16'),
  ('n', 10**9, 'within 1 and 16'),
  ('n', 10**300, 'within 1 and 16'),
  ('n', True, 'expected int, got bool'),
  ('max_tokens', 0, 'at least 1 without echo'),
  ('max_tokens', -5, 'at least 1'),
  ('max_tokens', '5', 'expected int, got str'),
  ('min_tokens', 17, 'at most max_tokens'),
  ('min_tokens', -1, 'within 0'),
  ('logprobs', 21, 'within 0 and 20'),
  ('logprobs', True, 'expected int, got bool'),
  ('best_of', 2, 'must equal n'),
  ('suffix', 'x', 'not served'),
  ('stop', ['a'] * 17, 'at most 16'),
  ('stop', 'a' * 257, '1 to 256 characters'),
  ('stop', [''], '1 to 256 characters'),
  ('stop_token_ids', [257], 'from 0 to 256'),
  ('stop_token_ids', [-1], 'from 0 to 256'),
  ('stop_token_ids', [1] * 65, 'at most 64'),
  ('logit_bias', {'x': 1}, 'ids of tokens'),
  ('logit_bias', {'257': 1}, 'from 0 to 256'),
  ('logit_bias', {'²': 1}, 'ids of tokens'),
  ('logit_bias', {'1': 101}, 'within -100 and 100'),
  ('logit_bias', {str(i): 1 for i in range(301)}, 'at most 300'),
  ('cache_salt', 'a' * 257, 'at most 256'),
  ('stream_options', {'include_usage': True}, 'stream: true'),
  ('prompt', [], '1 to 64 prompts'),
  ('prompt', ['a'] * 65, '1 to 64 prompts'),
  ('prompt', [[]], 'at least one token'),
  ('prompt', ['a', 1], 'all strings or all ids'),
  ('prompt', [1, [1]], 'all strings or all ids'),
  ('prompt', [[1, 'a']], 'expected int, got str'),
  ('prompt', [257], 'from 0 to 256'),
  ('prompt', [-1], 'from 0 to 256'),
  ('prompt', [10**30], 'from 0 to 256'),
  ('prompt', {'text': 'a'}, 'expected'),
  ('model', 'x' * 10_000, 'There is no model'),
]


@pytest.mark.parametrize(
  ('field', 'value', 'sentence'), FIELDS, ids=lambda x: str(x)[:20]
)
def test_a_wrong_value_is_named(server, field, value, sentence):
  status, body = server.post(TEXT, {'prompt': 'a'} | {field: value})
  assert status == (404 if field == 'model' else 400)
  error = body['error']
  assert sentence in error['message']
  assert error['message'].endswith('.')
  assert len(error['message']) < 300
  assert error['param'].startswith(field)
  assert error['code'] in errors.CODES


@pytest.mark.parametrize(
  ('content', 'sentence'),
  [
    (b'', 'it is empty'),
    (b'{', 'truncated'),
    (b'[]', 'expected object, got array'),
    (b'null', 'expected object'),
    (b'{"temperature": NaN}', 'not valid JSON'),
    (b'{"temperature": Infinity}', 'not valid JSON'),
    (b'{"temperature": 1e999}', 'out of range'),
    (b'{"prompt": "\\ud800"}', 'must come in pairs'),
    (b'{"prompt": "\xff"}', 'utf-8'),
    ('{"prompt": "a"}'.encode('utf-16'), 'not valid JSON'),
    (b'{"metadata":' + b'[' * 10_000, 'nested too deep'),
    (b'{"metadata":' + b'{"a":' * 500_000, 'nested too deep'),
    (b'{"prompt": "a"} {}', 'trailing'),
    (b'{"response_format": {"type": "text", "strict": 1}}', 'response_format'),
    (
      b'{"response_format": {"type": "json_schema", "json_schema": '
      b'{"name": "a", "schema": {"title": "\xff"}}}}',
      'utf-8',
    ),
  ],
)
def test_what_is_no_json_is_told(server, content, sentence):
  status, _, answer = server.request('POST', TEXT, content)
  assert status == 400
  assert sentence in json.loads(answer)['error']['message']


def test_choices_are_bounded_by_slots(server):
  most = options.CHOICES_A_SLOT * server.engine.slots
  body = {'prompt': ['a'] * 3, 'n': 6}
  assert most < 3 * 6
  status, answer = server.post(TEXT, body)
  assert status == 400
  assert f'at most {most}' in answer['error']['message']


def test_chats_need_a_template(server):
  said = {'messages': [{'role': 'user', 'content': 'hi'}]}
  status, body = server.post(CHAT, said)
  assert status == 400
  assert body['error']['code'] == 'chat_template_missing'
  assert '/v1/completions' in body['error']['message']
  assert '--chat-template' in body['error']['message']


def test_neutral_fields_are_accepted(server):
  neutral = {
    'user': 'me',
    'metadata': {'a': ['b']},
    'store': False,
    'service_tier': 'auto',
    'safety_identifier': 'x',
    'prompt_cache_key': 'y',
  }
  assert server.post(TEXT, {'prompt': 'a', 'max_tokens': 1} | neutral)[0] == 200


@pytest.mark.parametrize(
  ('state', 'sentence'),
  [
    ('starting', 'compiling 3 of 9'),
    ('draining', 'ending'),
    ('dead', 'failed'),
  ],
)
def test_without_an_engine_all_is_503(state, sentence):
  engine = FakeEngine(state=state)
  engine.stage = 'compiling 3 of 9'
  engine.failure = RuntimeError() if state == 'dead' else None
  with running(engine) as server:
    for method, path, body in (
      ('GET', '/health', None),
      ('POST', TEXT, {'prompt': 'a'}),
      ('POST', CHAT, {'messages': []}),
    ):
      status, headers, content = server.request(method, path, body)
      assert status == 503
      assert int(headers['retry-after']) <= 120
      assert sentence in json.loads(content)['error']['message']


def test_a_step_that_never_ends_is_no_health():
  engine = FakeEngine()
  with running(engine) as server:
    assert server.get('/health')[0] == 200
    engine.heartbeat_age = lambda: 1e3
    status, _, content = server.get('/health')
    assert status == 503
    assert 'has not moved' in json.loads(content)['error']['message']


@pytest.mark.parametrize(
  ('raised', 'status', 'code'),
  [
    (jobs.QueueFull('full.', 7), 429, 'queue_full'),
    (jobs.Draining('no.'), 503, 'unavailable'),
    (jobs.EngineDead('dead.'), 503, 'unavailable'),
    (KeyError('secret'), 500, 'server_error'),
  ],
)
def test_what_the_engine_refuses(raised, status, code, monkeypatch):
  with running() as server:

    def refuse(jobs, deliver):
      raise raised

    monkeypatch.setattr(server.engine, 'submit_all', refuse)
    for streams in (False, True):
      found, headers, content = server.request(
        'POST', TEXT, {'prompt': 'a', 'stream': streams}
      )
      error = json.loads(content)['error']
      assert (found, error['code']) == (status, code)
      assert 'secret' not in content.decode()
      if status == 429:
        assert headers['retry-after'] == '7'
      if status == 500:
        assert headers['x-should-retry'] == 'false'
    text = server.get('/metrics')[2].decode()
    assert f'jaxsparse_requests_rejected_total{{code="{code}"}} 2.0' in text
    # Nothing is kept of them.
    assert not server.service.delivery._queues


def test_room_is_what_is_left():
  assert options.room(10, 5, 64, 'prompt') == 5
  assert options.room(10, None, 64, 'prompt') == 54
  assert options.room(10, 65_535, 64, 'prompt') == 54
  assert options.room(64, 0, 64, 'prompt') == 0
  # Where a slot has no end an answer still has one.
  assert options.room(10**6, None, 2**31 - 1, 'prompt') == 65_536
