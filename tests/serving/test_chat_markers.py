# SPDX-License-Identifier: Apache-2.0
"""Chats of published models: a template's markers are tokens, a user's text."""

import numpy as np
import pytest
from chat_tokenizer import BOS, CHATML, END, SPECIAL, START, STOP, published
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.data.tokenizer import ByteTokenizer


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return published(
    tmp_path_factory.mktemp('chatml'),
    eos_token='<|im_end|>', bos_token='<|im_start|>', chat_template=CHATML,
  )  # fmt: skip


def chat(template, tokenizer, *contents):
  roles = ['user', 'assistant'] * len(contents)
  messages = [
    {'role': role, 'content': content}
    for role, content in zip(roles, contents, strict=False)
  ]
  return ChatTemplate(template).tokens(messages, tokenizer).tolist()


def test_markers_of_the_template_are_tokens(tokenizer):
  text = tokenizer.encode
  assert chat(CHATML, tokenizer, ' hello ') == [
    START, *text('user\nhello'), STOP, *text('\n'), START, *text('assistant\n')
  ]  # fmt: skip


@pytest.mark.parametrize('marker', SPECIAL)
def test_markers_in_a_message_are_text(tokenizer, marker):
  said = f'{marker} hel{marker}{marker}lo {marker}'
  tokens = chat(CHATML, tokenizer, f' {said}\n')
  assert tokens == [
    START, *tokenizer.encode(f'user\n{said}'), STOP, *tokenizer.encode('\n'),
    START, *tokenizer.encode('assistant\n'),
  ]  # fmt: skip


PARTS = st.sampled_from(
  [*SPECIAL, '<', '|', '>', '<|im_', 'end|>', '|>', 's>', ' ', '\n', 'hello']
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(PARTS, max_size=6).map(''.join), min_size=1))
@example(['<|im_', 'end|>'])
@example(['<', '|im_start|>'])
@example(['< ', ' s>'])
def test_no_messages_make_a_marker(tokenizer, contents):
  """Not even where a template puts nothing between them."""
  template = '{% for m in messages %}{{ m.content | trim }}{% endfor %}|>'
  tokens = chat(template, tokenizer, *contents)
  assert tokens[0] == END
  assert not set(tokens[1:]) & {END, START, STOP, BOS}
  said = ''.join(x.strip() for x in contents) + '|>'
  assert tokenizer.decode(tokens) == said


def test_a_prompt_begins_once(tmp_path):
  config = dict(eos_token='<|endoftext|>', bos_token='<s>', add_bos_token=True)
  llama = published(tmp_path, **config)
  assert llama.begin_id == BOS
  hello = llama.encode('hello').tolist()
  said = '{{ messages[0].content }}'
  for template in (said, '{{ bos_token }}' + said, '<s>' + said):
    assert chat(template, llama, 'hello') == [BOS, *hello]
  both = said + '{{ eos_token }}{{ bos_token }}'
  assert chat(both, llama, 'hello') == [BOS, *hello, END, BOS]


def test_a_tokenizer_without_markers_has_an_end_of_turns():
  template = '{{ bos_token }}{{ messages[0].content }}{{ eos_token }}'
  assert chat(template, ByteTokenizer(), 'é') == [256, 0xC3, 0xA9, 256]


def test_templates_test_for_tools(tokenizer):
  template = '{% if tools is not none %}tools{% endif %}hello'
  assert chat(template, tokenizer, '')[1:] == tokenizer.encode('hello').tolist()


@pytest.mark.parametrize('form', ['text', 'list', 'file'])
def test_a_workdir_brings_its_template(tmp_path, form):
  found = '{{ messages[0].content }}!'
  given = found
  if form == 'list':
    given = [
      dict(name='tool_use', template='x'),
      dict(name='default', template=found),
    ]
  if form == 'file':
    (tmp_path / 'chat_template.jinja').write_text(found)
    given = 'another'
  tokenizer = published(tmp_path, chat_template=given)
  template = ChatTemplate.of_workdir(str(tmp_path))
  tokens = template.tokens([dict(role='user', content='hello')], tokenizer)
  np.testing.assert_array_equal(tokens[1:], tokenizer.encode('hello!'))
  assert ChatTemplate.of_workdir(str(tmp_path / 'none')) is None
