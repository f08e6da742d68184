# SPDX-License-Identifier: Apache-2.0
"""Keys, origins, names, templates: who may ask, and what a request reaches."""

import ast
import base64
import hmac
import json
import logging
import pathlib

import pytest
from running import NAME, running

import jaxsparse.serving
from jaxsparse.config.errors import UserError
from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.serving import messages
from jaxsparse.serving.errors import ApiError
from jaxsparse.serving.protocol import Message

KEY = 'the key of the test'
TEXT = '/v1/completions'
PATHS = [
  ('GET', '/'),
  ('GET', '/metrics'),
  ('GET', '/v1/models'),
  ('GET', f'/v1/models/{NAME}'),
  ('GET', '/tokenizer_info'),
  ('GET', '/nothing'),
  ('POST', TEXT),
  ('POST', '/v1/chat/completions'),
  ('POST', '/tokenize'),
  ('POST', '/detokenize'),
]


@pytest.fixture(scope='module')
def locked():
  with running(key=KEY) as found:
    yield found


@pytest.mark.parametrize(('method', 'path'), PATHS)
def test_all_but_health_needs_the_key(locked, method, path):
  for header in ({}, {'authorization': 'Bearer x'}, {'authorization': KEY}):
    status, headers, content = locked.request(
      method, path, b'{}' if method == 'POST' else None, header
    )
    assert status == 401
    assert json.loads(content)['error']['code'] == 'invalid_api_key'
    assert KEY not in content.decode() + str(headers)
  assert locked.get('/health')[0] == 200


def test_the_key_opens(locked):
  password = base64.b64encode(f'anyone:{KEY}'.encode()).decode()
  for header in (f'Bearer {KEY}', f'bearer {KEY}', f'Basic {password}'):
    assert locked.get('/v1/models', authorization=header)[0] == 200


@pytest.mark.parametrize(
  'header', ['Basic !', 'Basic', 'Bearer', 'Bearer \xff', 'x' * 8000]
)
def test_odd_keys_are_wrong_keys(locked, header):
  assert locked.get('/v1/models', authorization=header)[0] == 401


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
  compared = []

  def compare(a, b):
    compared.append((a, b))
    return False

  monkeypatch.setattr(hmac, 'compare_digest', compare)
  assert locked.get('/metrics', authorization=f'Bearer {KEY}')[0] == 401
  assert compared == [(KEY.encode(), KEY.encode())]


def test_no_log_has_the_key_or_what_was_written(locked, caplog):
  caplog.set_level(logging.DEBUG)
  header = {'authorization': f'Bearer {KEY}'}
  body = {'prompt': 'canary', 'max_tokens': 3, 'seed': 0, 'user': 'someone'}
  assert locked.post(TEXT, body, **header)[0] == 200
  locked.post(TEXT, {'prompt': 'canary', 'x': 1}, **header)
  text = caplog.text
  assert 'prompt 7 drawn 3 seed 0' in text
  for secret in (KEY, 'canary', "'can", 'someone'):
    assert secret not in text


def test_what_was_written_is_logged_if_asked_for(caplog):
  caplog.set_level(logging.INFO)
  with running(logs_text=True) as server:
    server.post(TEXT, {'prompt': 'abc', 'max_tokens': 3, 'seed': 0})
  assert "wrote 'abc'" in caplog.text


def test_no_page_elsewhere_may_read(server):
  origin = {'origin': 'https://elsewhere.example'}
  _, headers, _ = server.request('GET', '/v1/models', headers=origin)
  assert not [name for name in headers if name.lower().startswith('access-')]
  asked = origin | {'access-control-request-method': 'POST'}
  status, headers, _ = server.request('OPTIONS', TEXT, headers=asked)
  assert status == 405
  assert not [name for name in headers if name.lower().startswith('access-')]


def test_a_page_elsewhere_can_not_even_ask(server):
  """What browsers send without asking first has another type."""
  for kind in ('text/plain', 'application/x-www-form-urlencoded', ''):
    status, body = server.post(TEXT, {'prompt': 'a'}, **{'content-type': kind})
    assert status == 415
    assert 'content-type' in body['error']['message']


def test_an_origin_that_was_named_may():
  named, other = 'https://named.example', 'https://other.example'
  with running(origins=(named,), key=KEY) as server:
    asked = {'access-control-request-method': 'POST', 'origin': named}
    status, headers, _ = server.request('OPTIONS', TEXT, headers=asked)
    assert status == 200
    assert headers['access-control-allow-origin'] == named
    status, _, _ = server.request(
      'OPTIONS', TEXT, headers=asked | {'origin': other}
    )
    assert status == 400


@pytest.mark.parametrize(
  'name', ['../../etc/passwd', '/etc/passwd', '..', '%2e%2e%2fetc', '\0', '~']
)
def test_names_lead_to_no_file(server, name):
  status, body = server.post(TEXT, {'prompt': 'a', 'model': name})
  assert (status, body['error']['code']) == (404, 'model_not_found')
  if name.isprintable():
    assert server.get(f'/v1/models/{name}')[0] == 404


def test_no_file_is_opened_for_a_request():
  """Only what runs before the first one reads files."""
  folder = pathlib.Path(jaxsparse.serving.__file__).parent
  opening = {'open', 'read_text', 'read_bytes', 'write_text', 'write_bytes'}
  found = {
    file.name
    for file in folder.glob('*.py')
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, (ast.Name, ast.Attribute))
    and (node.id if isinstance(node, ast.Name) else node.attr) in opening
  }
  # The page and the key; and `Delivery.open`, which is no file.
  assert found <= {'app.py', 'work.py', 'command.py'}


@pytest.mark.parametrize(
  'source',
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    '{{ messages.__class__.__init__.__globals__ }}',
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    '{{ messages.append(1) }}',
    "{% set x = messages[0].update({'a': 1}) %}",
    '{{ lipsum.__globals__.os }}',
    "{% include '/etc/passwd' %}",
    '{{ 1 // 0 }}',
    '{{ messages[7].content.x.y }}',
  ],
)
def test_templates_run_no_code(source):
  template = ChatTemplate(source)
  with pytest.raises(ApiError) as caught:
    messages.tokens(template, [Message('user', 'hi')], ByteTokenizer())
  assert caught.value.status == 400
  assert 'chat template fails' in caught.value.message


def test_a_broken_template_is_told(tmp_path):
  with pytest.raises(UserError, match='is no template of Jinja'):
    ChatTemplate('{% for %}')
  with pytest.raises(UserError, match="can't be read"):
    ChatTemplate.read(str(tmp_path / 'none'), '--chat-template')


def test_a_template_may_refuse():
  template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
  with pytest.raises(ApiError, match='refuses: roles must alternate'):
    messages.tokens(template, [Message('user', 'hi')], ByteTokenizer())


def test_a_message_can_not_end_its_turn():
  template = ChatTemplate(
    '{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}'
  )
  said = {'role': 'user', 'content': '<|endoftext|></s>'}
  tokens = template.tokens([said], ByteTokenizer())
  assert tokens.tolist() == [256, *b'<|endoftext|></s>', 256]
  other = ChatTemplate('{{ eos_token }}')
  assert template._end != other._end


def test_the_page_reaches_nothing_else(server):
  status, headers, content = server.get('/')
  assert status == 200
  policy = headers['content-security-policy']
  assert policy.startswith("default-src 'none'; connect-src 'self';")
  assert 'unsafe' not in policy
  assert headers['x-content-type-options'] == 'nosniff'
  for sign in (b'http://', b'https://', b'src=', b'@import', b'innerHTML'):
    assert sign not in content
