# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness with our scorer: two tasks of its own kind of files."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scored_models
from commands import exit_code
from documents import DOCS, ROOT
from small_run import save_untrained

from jaxsparse.evaluation import metrics
from jaxsparse.evaluation.encoding import encode_pair, rolling_windows
from jaxsparse.evaluation.tasks import QuestionTask
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.text import Request, encode_prompt

TASKS = DOCS / 'examples' / 'lm_eval'


def test_without_the_package_a_sentence_says_what_to_install(
  monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(
    sys.modules, 'jaxsparse.evaluation.harness', raising=False
  )
  assert exit_code(['evaluate', '--workdir=runs', '--harness=piqa']) == 2
  assert capsys.readouterr().err == (
    'error: --harness needs lm_eval, which is not installed: pip install '
    "'jaxsparse[eval]'.\n"
  )


@pytest.fixture
def harness(tmp_path, monkeypatch):
  """With a cache of its own, and without the net."""
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  # Where its tasks find their data.
  monkeypatch.chdir(TASKS)
  from jaxsparse.evaluation import harness

  return harness


@pytest.fixture(scope='module')
def scorer():
  return scored_models.scorer('dense', 256, 64)


@pytest.mark.slow
def test_two_local_tasks_have_the_numbers_of_our_own_scorer(
  harness, scorer, tmp_path
):
  names = ['python_keywords', 'python_endings']
  found = harness.evaluate(scorer, names, include_path=str(TASKS))
  rows = [json.loads(s) for s in (TASKS / 'keywords.jsonl').open()]
  ours = tmp_path / 'keywords.jsonl'
  ours.write_text(
    '\n'.join(
      json.dumps(
        dict(
          context=row['text'], choices=row['choices'], gold=row['label'],
          delimiter='', unconditional=None,
        )
      )
      for row in rows
    )
  )  # fmt: skip
  task = QuestionTask.read('keywords', ours)
  encodings = task.encode(scorer)
  scores = scorer.scores(encodings.sequences)
  expected = task.measure(encodings, scores, scorer.tokenizer)
  theirs = found['results']['python_keywords']
  for name in ('acc', 'acc_norm'):
    assert theirs[f'{name},none'] == expected[name].value
    assert theirs[f'{name}_stderr,none'] == pytest.approx(expected[name].error)
  samples = sorted(
    found['samples']['python_keywords'], key=lambda s: s['doc_id']
  )
  of_samples = [r for s in samples for (r,) in s['resps']]
  assert len(of_samples) == len(scores) == 80
  for (logprob, is_greedy), score in zip(of_samples, scores, strict=True):
    assert float(logprob) == pytest.approx(score.logprob, abs=1e-5)
    assert bool(is_greedy) == score.is_greedy
  rows = [json.loads(s) for s in (TASKS / 'endings.jsonl').open()]
  stop, greedy = (' ', '(', '\n'), Sampling(temperature=0.0)
  written = scorer.generate(
    [
      Request(prompt=row['text'], max_tokens=8, stop=stop, sampling=greedy)
      for row in rows
    ]
  )
  samples = sorted(
    found['samples']['python_endings'], key=lambda s: s['doc_id']
  )
  assert [s['resps'][0][0] for s in samples] == written
  assert 'python_keywords' in harness.table(found)


@pytest.mark.slow
def test_pairs_and_windows_are_those_of_the_harness(harness, scorer):
  from lm_eval.api.model import TemplateLM
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

  tokenizer = scorer.tokenizer

  class Theirs(TemplateLM):
    eot_token_id = tokenizer.boundary_id
    loglikelihood_rolling = generate_until = None

    def tok_encode(self, string, add_special_tokens=None, **_):
      whole = encode_prompt(tokenizer, string).tolist()
      return whole[1:] if add_special_tokens is False else whole

    def _loglikelihood_tokens(self, requests, **_):
      return [(c + t, len(t)) for _, c, t in requests]

  pairs = [('', 'a'), ('a b', ' c'), ('a \n', 'b'), ('né', ' d'), ('a', 'é')]
  theirs = Theirs().loglikelihood([SimpleNamespace(args=p) for p in pairs])
  ours = [encode_pair(tokenizer, *pair, 64) for pair in pairs]
  assert theirs == [(o.tokens.tolist(), o.num_targets) for o in ours]
  for count in (1, 3, 4, 5, 9, 17):
    for window in (1, 4, 7):
      for context in range(1, window + 1):
        theirs = get_rolling_token_windows([*range(count)], 99, window, context)
        tokens = np.array([99, *range(count)], np.int32)
        ours = rolling_windows(tokens, window, window - context + 1)
        for (inputs, targets), own in zip(theirs, ours, strict=True):
          assert own.tokens[:-1].tolist() == inputs
          assert own.targets.tolist() == targets
  first, *rest = get_rolling_token_windows([*range(10)], 99, 4, 1)
  assert [make_disjoint_window(pair) for pair in rest][-1] == (
    [5, 6, 7],
    [8, 9],
  )
  assert first == ([99, 0, 1, 2], [0, 1, 2, 3])


@pytest.mark.slow
def test_a_model_by_its_name_scores_whole_texts(harness, tmp_path):
  from lm_eval.api.registry import get_model

  save_untrained(tmp_path, scored_models.DENSE)
  of_harness = get_model('jaxsparse').create_from_arg_string(
    f'workdir={tmp_path},batch_tokens=64', {'batch_size': 1}
  )
  text = 'a text that is longer than a window'
  (nats,) = of_harness.loglikelihood_rolling([SimpleNamespace(args=(text,))])
  expected = metrics.of_texts([nats], [len(text)], 8)['bits_per_byte'].value
  assert expected == pytest.approx(8.0, abs=0.5)
  assert of_harness.tokenizer_name == 'jaxsparse'


WITHOUT_TORCH = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec

def find_spec(cls, name, *args):
  is_torch = name.partition('.')[0] in ('torch', 'transformers')
  return None if is_torch else find(name, *args)

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
from jaxsparse.cli.command import main
main(sys.argv[1:])
assert 'torch' not in sys.modules
"""


@pytest.mark.slow
def test_the_command_needs_no_torch(harness, tmp_path):
  del harness
  save_untrained(tmp_path, scored_models.DENSE)
  done = subprocess.run(
    [
      sys.executable, '-c', WITHOUT_TORCH, 'evaluate', f'--workdir={tmp_path}',
      '--harness=python_keywords', '--include-path=.', '--max-len=64',
      '--limit=4',
    ],
    cwd=TASKS,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert '|python_keywords|' in done.stdout
  (path,) = (tmp_path / 'evaluations').iterdir()
  kept = json.loads(path.read_text())
  assert 0 <= kept['results']['python_keywords']['acc,none'] <= 1


@pytest.mark.slow
def test_a_task_that_is_not_there_is_a_sentence(harness, scorer):
  with pytest.raises(ValueError, match="has no task 'python_keyword'"):
    harness.evaluate(scorer, ['python_keyword'], include_path=str(TASKS))
