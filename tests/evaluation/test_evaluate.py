# SPDX-License-Identifier: Apache-2.0
"""The command: results and items in the workdir, differences, resumption."""

import json
import math
import shutil

import numpy as np
import pytest
import scored_models
from commands import exit_code
from pictures import figures, texts
from small_run import save_untrained

from jaxsparse.analysis import plots
from jaxsparse.evaluation import run as run_lib
from jaxsparse.evaluation.scorer import Scorer

MODEL = scored_models.SMALL
QUESTIONS = [
  dict(id='sky', context='The sky', choices=['is', 'isn'], gold=0),
  dict(context='A cat, if asked, says', choices=['miau', 'wau'], gold=1),
  dict(context='1', choices=['2', 'x', 'y'], gold=2),
]
# Of four rows and up to 16 tokens: one program for all.
BATCH = '--batch-tokens=64'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """Two runs and a file of questions, as one folder."""
  folder = tmp_path_factory.mktemp('evaluated')
  for name, deviation in (('one', 0.3), ('two', 0.5)):
    (folder / name).mkdir()
    save_untrained(folder / name, MODEL, deviation)
  lines = [json.dumps(row) for row in QUESTIONS]
  (folder / 'animals.jsonl').write_text('\n'.join(lines))
  # Windows of 16, of which the last scores one byte.
  (folder / 'book.txt').write_text('A cat sat on a mat, é! ' * 3)
  return folder


@pytest.fixture(autouse=True)
def without_layout(monkeypatch):
  """Making room for labels takes as long as all else; other tests do it."""
  monkeypatch.setitem(plots.STYLE, 'figure.constrained_layout.use', False)


@pytest.fixture
def folder(source, tmp_path):
  return shutil.copytree(source, tmp_path / 'copy')


def evaluate(folder, capsys, *flags, workdir='one'):
  flags = [flag.replace('FOLDER', str(folder)) for flag in flags]
  code = exit_code(['evaluate', f'--workdir={folder / workdir}', BATCH, *flags])
  return code, *capsys.readouterr()


def results(folder, task, workdir='one'):
  path = folder / workdir / 'evaluations' / f'3.{task}.json'
  return json.loads(path.read_text())


def items(folder, task):
  path = folder / 'one' / 'evaluations' / f'3.{task}.items.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


ALL = '--requests=FOLDER/animals.jsonl', '--text=FOLDER/book.txt'


def test_tasks_and_texts(folder, capsys, monkeypatch):
  drawn = figures(monkeypatch)
  code, out, _ = evaluate(folder, capsys, *ALL)
  assert code == 0
  found = results(folder, 'animals')
  metrics = found['metrics']
  assert set(metrics) == {
    'acc', 'acc_norm', 'acc_bytes', 'acc_per_token', 'acc_pmi', 'bits_per_byte'
  }  # fmt: skip
  assert metrics['acc']['chance'] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
  assert metrics['acc']['value'] in (0, 1 / 3, 2 / 3, 1)
  assert found['num_items'] == 3
  assert found['num_cut'] == 1
  assert found['settings']['num_questions'] == 3
  assert 'animals: 1 of 3 lost the beginning of a context' in out
  rows = items(folder, 'animals')
  assert rows[0] == found['settings']
  by_name = {
    (r['id'], r['choice']): r for r in rows[1:] if not r.get('unconditional')
  }
  assert set(by_name) == {
    ('sky', 0), ('sky', 1), ('2', 0), ('2', 1), ('3', 0), ('3', 1), ('3', 2)
  }  # fmt: skip
  numbers = [f'{metrics["acc"][name]:.4f}' for name in ('value', 'stderr')]
  rows = [line.split() for line in out.splitlines()]
  assert ['animals', '3', 'acc', *numbers, '0.4444'] in rows
  (figure,) = drawn
  assert {'Accuracy', 'Bits per byte', 'animals'} <= {*texts(figure)}
  assert (folder / 'one' / 'plots' / 'evaluations.png').exists()


def test_bits_of_a_text_are_those_of_its_windows(folder, capsys):
  evaluate(folder, capsys, ALL[1])
  (path,) = (folder / 'one' / 'evaluations').glob('*.json')
  found = json.loads(path.read_text())
  text = (folder / 'book.txt').read_text()
  of_model = Scorer(
    MODEL,
    scored_models.draw_params(MODEL, 0.3),
    scored_models.ByteTokenizer(),
    16,
    64,
  )
  (nats,) = of_model.rolling([text])
  bits = -nats / math.log(2) / len(text.encode())
  metrics = found['metrics']
  assert metrics['bits_per_byte']['value'] == pytest.approx(bits, abs=1e-5)
  assert metrics['byte_perplexity']['value'] == pytest.approx(2**bits, rel=1e-4)


def test_an_evaluation_that_is_stopped_goes_on(folder, capsys, monkeypatch):
  _, whole, _ = evaluate(folder, capsys, ALL[0])
  expected = results(folder, 'animals')
  rows = items(folder, 'animals')
  shutil.rmtree(folder / 'one' / 'evaluations')
  in_batches, asked = Scorer.in_batches, []

  def interrupted(self, sequences):
    asked.append(len(sequences))
    for i, found in enumerate(in_batches(self, sequences)):
      if i == 5 and len(asked) == 1:
        raise KeyboardInterrupt
      yield found

  monkeypatch.setattr(Scorer, 'in_batches', interrupted)
  monkeypatch.setattr(run_lib, '_WRITE_SECONDS', 0.0)
  assert evaluate(folder, capsys, ALL[0])[0] == 130
  file = folder / 'one' / 'evaluations' / '3.animals.items.jsonl'
  assert len(file.read_text().splitlines()) == 6
  # A kill may cut a line.
  file.write_text(file.read_text()[:-9])
  _, out, _ = evaluate(folder, capsys, ALL[0])
  assert asked == [14, 10]
  assert '4 of 14 scores are taken from' in out
  assert out.endswith(whole[whole.index('task ') :])
  assert results(folder, 'animals') == expected

  def by_number(rows):
    return sorted((r for r in rows if 'number' in r), key=lambda r: r['number'])

  lines = file.read_text().splitlines()
  kept = [json.loads(line) for line in lines if line.endswith('}')]
  assert by_number(kept) == by_number(rows)
  # What is complete is not asked again.
  evaluate(folder, capsys, ALL[0])
  assert len(asked) == 2


def test_scores_of_other_settings_are_not_taken(folder, capsys):
  def is_new(*more):
    code, out, _ = evaluate(folder, capsys, ALL[0], *more)
    assert code == 0
    assert len(items(folder, 'animals')) == 15
    return 'are taken from' not in out

  assert [is_new(), is_new()] == [True, False]
  rows = [*QUESTIONS[1:], QUESTIONS[0]]
  (folder / 'animals.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  assert [is_new(), is_new('--max-len=15')] == [True, True]
  (folder / 'one' / 'tokenizer_config.json').write_text('{}')
  assert is_new('--max-len=15')


def test_a_part_has_a_file_of_its_own(folder, capsys):
  evaluate(folder, capsys, ALL[0], '--limit=3')
  _, out, _ = evaluate(folder, capsys, ALL[0], '--limit=2')
  assert 'animals (first 2)' in out
  assert len(items(folder, 'animals')) == 15
  assert len(items(folder, 'animals_first_2')) == 9


def test_differences_of_two_runs(folder, capsys):
  for name in ('one', 'two'):
    evaluate(folder, capsys, *ALL, workdir=name)
  code, out, _ = evaluate(folder, capsys, *ALL, '--against=FOLDER/two')
  assert code == 0
  assert '14 of 14 scores are taken from' in out
  bits = [
    results(folder, 'animals', name)['metrics']['bits_per_byte']
    for name in ('one', 'two')
  ]
  path = folder / 'one' / 'evaluations' / '3.against.two.3.json'
  kept = json.loads(path.read_text())['differences']
  difference = kept['animals']['bits_per_byte']
  assert difference['difference'] == pytest.approx(
    bits[0]['value'] - bits[1]['value']
  )
  # Of the same questions: not the errors of both.
  assert difference['stderr'] < np.hypot(*(b['stderr'] for b in bits))
  assert kept['animals']['acc'].keys() == {'difference', 'stderr'}
  shown = f'{difference["difference"]:+.4f}  {difference["stderr"]:.4f}'
  assert shown in out
  _, out, _ = evaluate(folder, capsys, *ALL, '--against=FOLDER/one')
  assert '+0.0000  0.0000' in out


def test_spaces_of_a_context_are_bytes_of_what_is_scored(folder, capsys):
  texts = (('A cat', '  sat'), ('A cat  ', 'sat'), ('A cat  ', ''))
  rows = [dict(context=c, continuation=of) for c, of in texts]
  values = []
  for i, row in enumerate(rows):
    (folder / f'{i}.jsonl').write_text(json.dumps(row))
    flag = f'--requests=FOLDER/{i}.jsonl'
    assert evaluate(folder, capsys, flag)[0] == 0
    values.append(results(folder, i)['metrics']['bits_per_byte']['value'])
  assert values[0] == pytest.approx(values[1])


def test_where_the_workdir_is_not_to_be_written(folder, capsys):
  code, _, _ = evaluate(
    folder, capsys, ALL[0], '--output=FOLDER/out', '--limit=1'
  )
  assert code == 0
  assert not (folder / 'one' / 'evaluations').exists()
  assert {p.name for p in (folder / 'out').iterdir()} == {
    '3.animals_first_1.json', '3.animals_first_1.items.jsonl',
    'evaluations.png',
  }  # fmt: skip


def test_a_link_in_the_workdir_is_not_followed(folder, capsys):
  evaluations = folder / 'one' / 'evaluations'
  evaluations.mkdir()
  (folder / 'precious').write_text('mine')
  (evaluations / '3.animals.items.jsonl').symlink_to(folder / 'precious')
  code, _, err = evaluate(folder, capsys, ALL[0])
  assert code == 2
  assert "can't be written" in err
  assert (folder / 'precious').read_text() == 'mine'


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ([], ['nothing is to be measured']),
    (['--tasks=anmals', '--data=FOLDER'], ['(did you mean animals?)']),
    (['--tasks=animals', '--data=FOLDER/none'], ['--data', 'no folder']),
    (['--requests=FOLDER/none.jsonl'], ['none.jsonl', 'No such file']),
    (['--text=FOLDER/*.md'], ['*.md', 'names no file']),
    ([ALL[0], '--tasks=animals', '--data=FOLDER'], ['two files are called']),
    (
      ['--text=FOLDER/b*ok.txt', '--text=FOLDER/b?ok.txt', ALL[1]],
      ['b*ok.txt', 'b?ok.txt', 'would go to one file'],
    ),
    ([ALL[0], '--limit=0'], ['--limit', '0']),
    ([ALL[0], '--batch-tokens=0'], ['--batch-tokens']),
    ([ALL[0], '--devices=9'], ['--devices', '1 and 8']),
    ([ALL[0], '--step=4'], ['step 4', '[3]']),
    ([ALL[0], '--max-len=3'], ['question sky', '4 tokens', 'than the 3']),
    ([ALL[1], '--window=17'], ['--window', '16']),
    ([ALL[1], '--window=4', '--stride=5'], ['--stride', '4', '5']),
    ([ALL[0], '--against=FOLDER/none'], ['none', 'config.json']),
    ([ALL[0], '--harness=x'], ['--harness', '--requests']),
    ([ALL[0], '--num-shots=5'], ['no flag --num-shots']),
  ],
  ids=str,
)
def test_bad_input_is_one_sentence(source, capsys, flags, words):
  code, _, err = evaluate(source, capsys, *flags)
  assert code == 2
  lines = [line for line in err.splitlines() if line.startswith('error')]
  assert len(lines) == 1
  assert 'Traceback' not in err
  for word in words:
    assert word in lines[0]
