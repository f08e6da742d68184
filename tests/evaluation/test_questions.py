# SPDX-License-Identifier: Apache-2.0
"""Files of questions: their forms, and what is wrong with others."""

import gzip
import json

import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.evaluation import find_tasks, questions
from jaxsparse.evaluation.questions import Question


def write(folder, *rows, name='task.jsonl'):
  file = folder / name
  file.parent.mkdir(parents=True, exist_ok=True)
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  text = '\n'.join(lines).encode()
  file.write_bytes(gzip.compress(text) if name.endswith('.gz') else text)
  return file


def read(folder, *rows):
  return questions.read(write(folder, *rows))[0]


def olmo(document, index, context, continuation, label=1):
  return dict(
    doc_id=document,
    idx=index,
    label=label,
    request_type='loglikelihood',
    request=dict(context=context, continuation=continuation),
  )


def test_a_question_of_our_own(tmp_path):
  row = dict(id='x', context='Q:', choices=['yes', 'né'], gold=1)
  (question,) = read(tmp_path, row)
  assert question == Question(
    'x', ('Q:', 'Q:'), ('yes', 'né'), 1, ' ', ('', '')
  )
  assert question.pairs == [
    ('Q:', ' yes'), ('Q:', ' né'), ('', ' yes'), ('', ' né')
  ]  # fmt: skip


def test_contexts_of_choices_and_what_may_be_set(tmp_path):
  row = dict(
    context=['The cat', 'The dog'], choices=['barks', 'barks'], gold=1,
    delimiter='', unconditional=None,
  )  # fmt: skip
  (question,) = read(tmp_path, '', row)
  assert question.id == '2'
  assert question.pairs == [('The cat', 'barks'), ('The dog', 'barks')]
  row['unconditional'] = 'Answer:'
  (question,) = read(tmp_path, row)
  assert question.pairs[2:] == [('Answer:', 'barks')] * 2


def test_pairs_and_last_words(tmp_path):
  (pair,) = read(tmp_path, dict(context='a', continuation=' b'))
  assert pair.pairs == [('a', ' b')]
  (word,) = read(tmp_path, dict(text='He nodded.\nThen she  left \n'))
  assert word.pairs == [('He nodded.\nThen she ', ' left')]
  assert word.choices == ('left',)


def test_choices_of_olmo_in_any_order_and_once(tmp_path):
  rows = [
    olmo(0, 1, 'Q:', ' b'), olmo(7, 0, 'R:', ' c', 0), olmo(0, 0, 'Q:', ' a'),
    olmo(7, 1, 'R:', ' d', 0), olmo(0, 1, 'Q:', ' another'),
  ]  # fmt: skip
  first, second = read(tmp_path, *rows)
  assert (first.id, first.gold, first.choices) == ('0', 1, (' a', ' b'))
  assert (second.id, second.gold, second.choices) == ('7', 0, (' c', ' d'))
  assert first.unconditional is None
  assert first.pairs == [('Q:', ' a'), ('Q:', ' b')]


def test_documents_of_olmo_without_their_context(tmp_path):
  rows = [
    olmo(document, i, context, text)
    for document, context in ((3, 'Q:'), (1_000_003, 'Answer:'))
    for i, text in enumerate((' a', ' b'))
  ]
  (question,) = read(tmp_path, *rows)
  assert question.unconditional == ('Answer:', 'Answer:')
  with pytest.raises(UserError, match='other choices in document 1000003'):
    read(tmp_path, *rows[:3])
  # One that has no other to be of is a question like all.
  (alone,) = read(tmp_path, *rows[2:])
  assert alone.id == '1000003'


def test_a_single_answer_of_olmo_needs_no_label(tmp_path):
  (word,) = read(tmp_path, olmo(0, 0, 'about', ' signs', ['signs']))
  assert word.pairs == [('about', ' signs')]
  assert word.gold == 0


def test_a_compressed_file(tmp_path):
  rows = [dict(context='a', continuation=str(i)) for i in range(5)]
  plain, packed = write(tmp_path, *rows), write(tmp_path, *rows, name='t.gz')
  found, sha256 = questions.read(packed)
  assert [q.choices for q in found] == [(str(i),) for i in range(5)]
  assert sha256 == questions.read(plain)[1]


GOOD = dict(context='Q:', choices=['a', 'b'], gold=0)


@pytest.mark.parametrize(
  ('rows', 'words'),
  [
    ([], ['holds no question']),
    ([GOOD, '{"context": '], ['line 2', 'no JSON']),
    (['[1]'], ['line 1', 'object', '[1]']),
    ([dict(prompt='x')], ['line 1', 'choices', "'prompt'"]),
    (['{}'], ['nothing']),
    ([GOOD | dict(id=7), GOOD | dict(id='7')], ['line 2', "'7' of line 1"]),
    ([GOOD | dict(id=2), GOOD], ['line 2', "'2' of line 1"]),
    ([GOOD | dict(gold=2)], ['gold', '0 and 1', 'got 2']),
    ([GOOD | dict(gold=-1)], ['gold', '-1']),
    ([GOOD | dict(gold=True)], ['gold', 'True']),
    ([GOOD | dict(gold='a')], ['gold', "'a'"]),
    ([dict(context='Q:', choices=['a', 'b'])], ['gold', 'None']),
    ([GOOD | dict(choices=[])], ['choices', '[]']),
    ([GOOD | dict(choices='ab')], ['choices', "'ab'"]),
    ([GOOD | dict(choices=['a', 3])], ['a choice', '3']),
    ([GOOD | dict(context=['a'])], ['1 contexts and 2 choices']),
    ([GOOD | dict(context=7)], ['context', '7']),
    ([GOOD | dict(unconditional=0)], ['unconditional', '0']),
    ([GOOD | dict(delimiter=None)], ['delimiter', 'None']),
    ([GOOD | dict(context='\ud800')], ['context', 'UTF-8']),
    ([dict(context='a', continuation=1)], ['continuation', '1']),
    ([dict(continuation='b')], ['context', 'None']),
    ([dict(text='word')], ['single word']),
    ([GOOD, olmo(0, 0, 'a', 'b')], ['two forms']),
    ([GOOD, dict(context='a', continuation='b')], ['several choices']),
    ([dict(request=3, doc_id=0, idx=0)], ['doc_id', 'request']),
    ([olmo('x', 0, 'a', 'b')], ['integers doc_id and idx']),
    ([olmo(0, 0, None, 'b')], ['context', 'None']),
    ([olmo(0, 0, '', 'a', 2), olmo(0, 1, '', 'b', 2)], ['label', 'got 2']),
  ],
  ids=str,
)
def test_what_is_no_question_is_one_sentence(tmp_path, rows, words):
  with pytest.raises(UserError) as raised:
    read(tmp_path, *rows)
  message = str(raised.value)
  assert '\n' not in message
  for word in words:
    assert word in message


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match='No such file'):
    questions.read(tmp_path / 'none.jsonl')
  with pytest.raises(UserError, match='directory'):
    questions.read(tmp_path)
  (tmp_path / 'task.jsonl.gz').write_bytes(b'no gzip')
  with pytest.raises(UserError, match="can't be read"):
    questions.read(tmp_path / 'task.jsonl.gz')
  packed = gzip.compress(json.dumps(GOOD).encode() * 99)
  (tmp_path / 'task.jsonl.gz').write_bytes(packed[:-12])
  with pytest.raises(UserError, match="can't be read"):
    questions.read(tmp_path / 'task.jsonl.gz')


def test_names_of_tasks(tmp_path):
  own = write(tmp_path, GOOD, name='deep/sky.jsonl')
  forms = {
    form: write(tmp_path, GOOD, name=f'{form}/requests.jsonl.gz')
    for form in (
      'arc/rc_0shot',
      'arc/mc_5shot',
      'sciq/mc_5shot',
      'sciq/rc_5shot',
    )
  }
  assert find_tasks.files(tmp_path, ['sky', 'arc', 'arc/mc_5shot']) == {
    'sky': own,
    'arc': forms['arc/rc_0shot'],
    'arc/mc_5shot': forms['arc/mc_5shot'],
  }
  for name, words in (
    ('sciq', ['several forms', 'sciq/mc_5shot, sciq/rc_5shot']),
    ('skye', ["no task 'skye'", '(did you mean sky?)']),
  ):
    with pytest.raises(UserError) as raised:
      find_tasks.files(tmp_path, [name])
    assert all(word in str(raised.value) for word in words)
  with pytest.raises(UserError, match='no folder'):
    find_tasks.files(tmp_path / 'none', ['sky'])
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='no file that ends in'):
    find_tasks.files(tmp_path / 'empty', ['sky'])
