# SPDX-License-Identifier: Apache-2.0
"""The guide's commands run on its own file, and the flags it names exist."""

import re
import shlex

import guide_steps
import pytest
import scored_models
from commands import exit_code
from documents import PAGES
from small_run import save_untrained

from jaxsparse.cli import evaluate
from jaxsparse.evaluation import questions

PAGE = PAGES['docs/guides/evaluate.md']
COMMANDS = [
  shlex.split(line)[2:]
  for line in re.findall(r'^jaxsparse evaluate .*', PAGE, re.MULTILINE)
]
# What needs a package, or its files, has tests of its own.
ELSEWHERE = ('--harness', '--data')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """What the reader of the guide has."""
  folder = tmp_path_factory.mktemp('guide')
  for name, deviation in (('ultramem_tiny', 0.3), ('dense_tiny', 0.5)):
    (folder / 'runs' / name).mkdir(parents=True)
    save_untrained(
      folder / 'runs' / name, scored_models.SMALL, deviation, seq_len=128
    )
  (folder / 'books').mkdir()
  (folder / 'books' / 'one.txt').write_text('A cat sat on a mat. ' * 20)
  guide_steps.take('evaluate', folder)
  return folder


def test_commands_run_one_after_another(folder, monkeypatch, capsys):
  monkeypatch.chdir(folder)
  shown = []
  for flags in COMMANDS:
    if not any(flag.startswith(ELSEWHERE) for flag in flags):
      assert exit_code(['evaluate', *flags]) == 0, capsys.readouterr().err
      shown.append(capsys.readouterr().out)
  questions_, text, both = shown
  assert 'acc_pmi' in questions_
  assert 'bits_per_byte' in text
  assert 'difference' in both
  left = {path.name for path in folder.glob('runs/ultramem_tiny/*/*')}
  assert {
    '3.animals.json', '3.animals.items.jsonl', 'evaluations.png'
  } <= left  # fmt: skip


def test_lines_of_other_forms_are_read(tmp_path):
  rows = re.findall(r'^\| `(\{.*\})` \|', PAGE, re.MULTILINE)
  assert len(rows) == 3
  for row in rows:
    file = tmp_path / 'task.jsonl'
    file.write_text(
      row.replace('"context": ...', '"context": "a"').replace('...', '" b"')
    )
    ((question,), _) = questions.read(file)
    assert len(question.choices) == 1


def test_flags_of_the_guide_are_there():
  for flags in COMMANDS:
    evaluate.parse_arguments(flags)
  known = vars(evaluate.parse_arguments(COMMANDS[0]))
  named = set(re.findall(r'`--([a-z-]+)', PAGE))
  assert {'max-len', 'against-step', 'devices', 'output'} <= named
  for flag in named:
    assert flag.replace('-', '_') in known, flag
