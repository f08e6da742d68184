# SPDX-License-Identifier: Apache-2.0
"""Chats: answers alone are learned, in the tokens that a model would write."""

import dataclasses
import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from chat_tokenizer import CHATML, STOP, published
from pyarrow import parquet as pq

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import chats, pipeline
from jaxsparse.data.chat_template import ChatTemplate, RefusedError
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
PLAIN = (
  '{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}'
  '{% endfor %}{% if add_generation_prompt %}a:{% endif %}'
)
TEMPLATE = ChatTemplate(PLAIN)


def said(*contents: str) -> list[dict[str, str]]:
  roles = itertools.cycle(['user', 'assistant'])
  pairs = zip(roles, contents, strict=False)
  return [{'role': role, 'content': content} for role, content in pairs]


def text_of(ids) -> str:
  return bytes(ids[ids < 256].tolist()).decode()


@pytest.fixture(scope='module')
def chatml(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chatml')
  return published(folder, eos_token='<|im_end|>', bos_token='<|im_start|>')


def test_an_answer_is_split_as_the_model_writes_it(chatml):
  """Its prompt is the server's to the token, and it ends where that stops."""
  template = ChatTemplate(CHATML)
  messages = said('hello', 'user assistant', 'hi', ' two ')
  [(tokens, of)] = template.answers(messages, chatml)
  for i in (1, 3):
    prompt = template.tokens(messages[:i], chatml)
    start = len(prompt)
    np.testing.assert_array_equal(tokens[:start], prompt)
    answer = chatml.encode(messages[i]['content'].strip()).tolist()
    assert tokens[start : start + len(answer) + 1].tolist() == [*answer, STOP]
    assert set(of[start : start + len(answer) + 1].tolist()) == {i}
  num_answered = len(chatml.encode('user assistant')) + 1
  num_answered += len(chatml.encode('two')) + 1
  assert (of >= 0).sum() == num_answered


def test_a_marker_in_an_answer_is_text(chatml):
  [(tokens, of)] = ChatTemplate(CHATML).answers(
    said('q', 'a<|im_end|>b'), chatml
  )
  answer = tokens[of == 1]
  assert answer.tolist().count(STOP) == 1
  assert chatml.decode(answer) == 'a<|im_end|>b'


def test_a_template_that_forgets_thoughts_gives_another_sequence():
  """The first answer is learned with its thought, the second without it."""
  template = ChatTemplate(
    '{% for m in messages %}{{ m.role[0] }}:'
    "{{ m.content if loop.last else m.content.split('>')[-1] }}{{ eos_token }}"
    '{% endfor %}{% if add_generation_prompt %}a:{% endif %}'
  )
  found = template.answers(said('q', 'why>A', 'r', 'so>B'), BYTES)
  assert [text_of(ids) for ids, _ in found] == ['u:qa:why>A', 'u:qa:Au:ra:so>B']
  assert [text_of(ids[of >= 0]) for ids, of in found] == ['why>A', 'so>B']


@pytest.mark.parametrize(
  ('source', 'words'),
  [
    ('{{ messages | length }}', r'messages\[1\] otherwise than behind'),
    (PLAIN.replace('{{ eos_token }}', ''), 'with no token that ends'),
    ("{{ raise_exception('no') }}", 'refuses: no'),
  ],
)
def test_a_template_that_can_not_teach_is_told(source, words):
  with pytest.raises(RefusedError, match=words):
    ChatTemplate(source).answers(said('q', 'a'), BYTES)


def config_of(folder, lines, name='chat.jsonl', **fields) -> DataConfig:
  path = folder / name
  opened = gzip.open if name.endswith('.gz') else open
  with opened(path, 'wt') as file:
    file.write('\n'.join(lines))
  fields = dict(
    dict(seq_len=48, batch_size=4, num_lanes=2, prefetch=1), **fields
  )
  return DataConfig(
    messages=str(path), cache_dir=str(folder / 'cache'), **fields
  )


def lines_of(number: int) -> list[str]:
  texts = [str(i) * (1 + i % 7) for i in range(number)]
  return [json.dumps({'messages': said(f'q{t}', f'a{t}')}) for t in texts]


def corpus_of(config, heard=None):
  say = (lambda _: None) if heard is None else heard.append
  return chats.encoded(
    build_corpus(config, say), BYTES, TEMPLATE, config.seq_len, say
  )


def answered(pieces) -> list[str]:
  return sorted(piece.text.decode() for piece in pieces)


def test_all_chats_are_read_and_split_by_content(tmp_path):
  lines = lines_of(40)
  raw = build_corpus(config_of(tmp_path, lines, validation_fraction=0.2))
  assert len(raw.train) == 32
  assert len(raw.validation) == 8
  wanted = sorted(json.loads(x)['messages'][1]['content'] for x in lines)
  assert answered([*raw.train, *raw.validation]) == wanted
  # Twice the same chat is on one side, and another order moves none.
  again = build_corpus(
    config_of(tmp_path, lines[::-1] + lines, 'b.jsonl', validation_fraction=0.2)
  )
  assert set(answered(again.validation)) == set(answered(raw.validation))
  assert len(again.validation) == 16
  assert again.key != raw.key


@pytest.mark.parametrize(
  ('name', 'wrap'),
  [
    ('lists.jsonl', lambda chats: '\n'.join(map(json.dumps, chats))),
    ('lists.json', json.dumps),
    (
      'objects.json',
      lambda chats: json.dumps([{'messages': x, 'id': 3} for x in chats]),
    ),
    (
      'lines.json',
      lambda chats: '\n'.join(json.dumps({'messages': x}) for x in chats),
    ),
    ('packed.jsonl.gz', lambda chats: '\n'.join(map(json.dumps, chats))),
  ],
)
def test_forms_of_files(tmp_path, name, wrap):
  both = [
    said('q', 'one'),
    [
      {'role': 'developer', 'content': 'be brief'},
      {'role': 'user', 'content': [{'type': 'text', 'text': 'q'}]},
      {'role': 'assistant', 'content': 'old', 'weight': 0},
      {'role': 'user', 'content': 'r'},
      {'role': 'assistant', 'content': 'two', 'weight': 1},
    ],
  ]
  corpus = build_corpus(config_of(tmp_path, [wrap(both)], name))
  [a], [b] = corpus.train, corpus.validation
  assert answered([a, b]) == ['one', 'two']
  longer = max(a, b, key=lambda chat: len(chat.messages))
  assert longer.messages[0] == {'role': 'system', 'content': 'be brief'}
  assert longer.messages[1] == {'role': 'user', 'content': 'q'}


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ('{', r'is no JSON .*, or leave it out\.$'),
    ('3', 'holds 3 where a list of messages belongs'),
    ('{"message": []}', r"no field 'messages' \(did you mean message\?\)"),
    ('{"messages": []}', r'holds \[\] where a list'),
    ('["hi"]', r"messages\[0\] is 'hi', no object"),
    ('[{"role": "tool", "content": "x"}]', "has the role 'tool'"),
    ('[{"role": "user", "content": null}]', 'has the content None, no text'),
    ('[{"role": "user", "content": "\\ud800"}]', 'half a character'),
    ('[{"role": "user", "content": "hi"}]', 'has no answer to learn'),
    (
      '[{"role": "assistant", "content": "a", "weight": 0.5}]',
      'has the weight 0.5, which is not 0 or 1',
    ),
    (
      '[{"role": "assistant", "content": "a", "weight": 0}]',
      'no answer to learn, as all of its answers have the weight 0: give one',
    ),
    (
      '[{"role": "assistant", "content": "", "tool_calls": [1]}]',
      'has tool_calls',
    ),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
  config = config_of(tmp_path, [*lines_of(2), line])
  with pytest.raises(UserError, match=words) as caught:
    build_corpus(config)
  assert f'line 3 of {config.messages!r}' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_column_of_another_name_is_named(tmp_path):
  path = tmp_path / 'chats.parquet'
  pq.write_table(pa.table({'turns': ['x']}), path)
  config = DataConfig(messages=str(path), cache_dir=str(tmp_path))
  message = r"no field 'messages': rename one of its own \(turns\)\.$"
  with pytest.raises(UserError, match=message):
    build_corpus(config)


def test_what_a_template_refuses_is_named(tmp_path):
  config = config_of(tmp_path, lines_of(3))
  template = ChatTemplate("{{ raise_exception('no') }}")
  with pytest.raises(UserError, match=r"line \d of '.*' can't be learned: "):
    chats.encoded(build_corpus(config), BYTES, template, 48, print)


def test_missing_files_name_the_setting(tmp_path):
  config = DataConfig(messages=str(tmp_path / 'none'), cache_dir=str(tmp_path))
  with pytest.raises(UserError, match=r'data\.messages = .*names no file'):
    build_corpus(config)


def test_long_chats_end_behind_an_answer_or_are_left_out_and_said(tmp_path):
  long = 'x' * 60
  lines = [
    *lines_of(10),
    json.dumps(said('q', 'short', 'r', long)),
    json.dumps(said(long, 'late')),
  ]
  heard = []
  corpus = corpus_of(config_of(tmp_path, lines), heard)
  kept = answered([*corpus.train, *corpus.validation])
  assert 'short' in kept
  assert 'late' not in kept
  assert len(kept) == 11
  assert heard == [
    'Chats longer than data.seq_len = 48 tokens: 2 of 12 (up to 80); shortened '
    'to the answers that fit: 1; left out, as none fits: 1.'
  ]
  assert corpus.validation_bytes == sum(
    len(piece.text) for piece in corpus.validation
  )
  with pytest.raises(UserError, match='seq_len = 4 is shorter than every'):
    corpus_of(config_of(tmp_path, lines, seq_len=4))


def test_they_are_made_once(tmp_path, monkeypatch):
  """By a tokenizer, a template and a length; another makes its own."""
  lines = [*lines_of(9), json.dumps(said('q', 'x' * 60))]
  config = config_of(tmp_path, lines, validation_fraction=0.3)
  raw, heard, made = build_corpus(config), [], []
  answers = ChatTemplate.answers
  monkeypatch.setattr(
    ChatTemplate, 'answers', lambda *args: made.append(args) or answers(*args)
  )

  def encoded(digest='one', template=TEMPLATE, seq_len=48):
    made.clear()
    args = raw, BYTES, template, seq_len, heard.append, digest
    return chats.encoded(*args), len(made)

  first, number = encoded()
  assert number == 10
  again, number = encoded()
  assert number == 0
  assert heard[-2] == heard[-1]
  assert 'left out, as none fits: 1' in heard[-1]
  for name in ('train', 'validation'):
    for a, b in zip(getattr(first, name), getattr(again, name), strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)
      np.testing.assert_array_equal(a.is_learned, b.is_learned)
      assert (a.text, a.tokens.dtype) == (b.text, b.tokens.dtype)
  assert again.validation_bytes == first.validation_bytes
  assert again.test is None
  assert encoded('two')[1] == 10
  assert encoded(template=ChatTemplate(' ' + PLAIN))[1] == 10
  assert encoded(seq_len=47)[1] == 10
  assert encoded('')[1] == 10
  # A damaged file is made again.
  for file in raw.directory.glob('answers_*'):
    file.write_bytes(file.read_bytes()[:-30])
  assert encoded()[1] == 10
  assert encoded()[1] == 0


def test_rows_hold_whole_chats_and_weigh_answers_alone(tmp_path):
  config = config_of(tmp_path, lines_of(70))
  corpus = corpus_of(config)
  stream = pipeline.train_iterator(config, corpus, BYTES, seed=0)
  seen = []
  for batch in itertools.islice(stream, 30):
    assert batch['loss_weight'].dtype == np.float32
    for row in range(4):
      segments = batch['segment_ids'][row]
      for segment in range(1, 1 + segments.max()):
        here = segments == segment
        tokens = batch['tokens'][row][here]
        targets = batch['targets'][row][here]
        assert tokens[0] == BYTES.begin_id
        weight = batch['loss_weight'][row][here] > 0
        # 'a:' is of the prompt, the boundary of the answer.
        question, answer = text_of(tokens).split('a:')
        assert text_of(targets[weight]) == answer
        assert targets[weight][-1] == BYTES.boundary_id
        assert question[2:].replace('q', 'a') == answer
        seen.append(answer)
      assert not batch['loss_weight'][row][segments == 0].any()
  assert set(seen) == set(answered(corpus.train))
  # Several in a row, or they would not be packed.
  assert len(seen) > 30 * 4 * 1.4


@pytest.mark.parametrize('align', [1, 8])
def test_chats_resume_exactly_and_split_over_processes(tmp_path, align):
  config = config_of(tmp_path, lines_of(70), align=align)
  corpus = corpus_of(config)

  def take(num, state=None, process=(0, 1)):
    stream = pipeline.train_iterator(config, corpus, BYTES, 0, *process)
    if state:
      stream.set_state(state)
    return list(itertools.islice(stream, num)), stream

  whole, _ = take(12)
  for steps in (1, 5):
    _, saved = take(steps)
    again, _ = take(12 - steps, json.loads(json.dumps(saved.get_state())))
    for a, b in zip(whole[steps:], again, strict=True):
      for name in a:
        np.testing.assert_array_equal(a[name], b[name])
  parts = [take(12, process=(p, 2))[0] for p in range(2)]
  for a, *halves in zip(whole, *parts, strict=True):
    np.testing.assert_array_equal(
      a['tokens'], np.concatenate([half['tokens'] for half in halves])
    )


def test_validation_holds_every_answer_once(tmp_path):
  config = config_of(tmp_path, lines_of(70), validation_fraction=0.5)
  corpus = corpus_of(config)
  targets = sum(
    int(batch['loss_weight'].sum())
    for batch in pipeline.validation_batches(config, corpus, BYTES)
  )
  assert targets == corpus.validation_bytes + len(corpus.validation)


def test_the_template_stays_the_run_s_own(tmp_path):
  config = DataConfig(messages='x')
  with pytest.raises(UserError, match=r'data\.chat_template=FILE'):
    chats.template_of(config, tmp_path, has_begun=False)
  file = tmp_path / 'mine.jinja'
  file.write_text(PLAIN)
  named = dataclasses.replace(config, chat_template=str(file))
  made = chats.template_of(named, tmp_path, has_begun=False)
  assert made.source == PLAIN
  # From then on the workdir has it.
  assert chats.template_of(config, tmp_path, has_begun=True).source == PLAIN
  assert chats.template_of(named, tmp_path, has_begun=True).source == PLAIN
  file.write_text(PLAIN + 'more')
  with pytest.raises(UserError, match='is not the template with which'):
    chats.template_of(named, tmp_path, has_begun=True)


def test_settings_that_do_not_go_together():
  for fields, words in (
    (dict(messages='a', text='b'), 'one of text, tfds, messages and pairs'),
    (dict(messages='a', split='file'), 'split'),
    (dict(chat_template='a'), 'no messages'),
    (dict(messages='a', tokenizer='bpe'), "'bpe' can't be trained"),
    (dict(replay_share=0.5), 'no replay'),
    (dict(replay='a', replay_share=1.0), 'below 1'),
  ):
    with pytest.raises(UserError, match=words):
      DataConfig(**fields)
