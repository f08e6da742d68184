# SPDX-License-Identifier: Apache-2.0
"""The command: text on stdout, one sentence for bad input, samples kept."""

import argparse
import dataclasses
import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import exit_code
from small_run import save_untrained

from jaxsparse import config
from jaxsparse.cli import generate
from jaxsparse.config.errors import UserError
from jaxsparse.data import corpus as corpus_lib
from jaxsparse.data.pieces import Piece
from jaxsparse.experiments.bench import long_input as bench
from jaxsparse.experiments.bench.report import Report
from jaxsparse.inference import long_input
from jaxsparse.nn.transformer import init_cache
from jaxsparse.run import workdir as workdir_lib

MODEL = config.ModelConfig(
  num_layers=1,
  model_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  vocab_size=257,
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('run'), MODEL)


@pytest.fixture(scope='module')
def sparse_workdir(tmp_path_factory):
  sparse = config.SparseAttentionConfig(
    block=4, tile=4, window_blocks=1, max_blocks=2
  )
  model = dataclasses.replace(
    MODEL, attention_pattern=('sparse',), sparse=sparse
  )
  return save_untrained(tmp_path_factory.mktemp('sparse'), model)


@pytest.fixture
def run(workdir, capsys):
  """(flags of one call) -> exit code, stdout, stderr."""

  def call(**flags):
    # Every way to draw is compiled anew: one for all that name none.
    flags = (
      dict(workdir=workdir, max_tokens=6, seed=5, top_k=20, top_p=0.9) | flags
    )
    argv = [
      f'--{k}={v}'
      for k, values in flags.items()
      for v in (values if isinstance(values, list) else [values])
      if v is not None
    ]
    return exit_code(['generate', *argv]), *capsys.readouterr()

  return call


def test_a_flag_says_how_keys_and_values_are_kept(run, monkeypatch):
  seen = []

  def prepare(model, *args):
    seen.append(model.kv_cache)
    raise UserError('enough')

  monkeypatch.setattr(generate.batch, 'prepare', prepare)
  assert run(kv='int8')[0] == run()[0] == 2
  assert seen == ['int8', 'exact']
  code, _, error = run(kv='int4')
  assert code == 2
  assert "invalid choice: 'int4'" in error


@pytest.mark.slow
def test_keys_and_values_of_8_bits_write_a_text(run):
  assert run(prompt='dé', kv='int8')[1].startswith('dé')


# So are prompts of every length: three bytes where any would do.
def test_the_same_seed_writes_the_same_text(run, workdir):
  code, text, report = run(prompt='dé')
  assert code == 0
  assert text.startswith('dé')
  assert 'tokens/s' in report
  assert run(prompt='dé')[1] == text
  row = json.loads((workdir / 'samples.jsonl').read_text().splitlines()[-1])
  assert row['step'] == 3
  assert row['seed'] == 5
  assert row['prompt'] + row['text'] + '\n' == text


def test_sample_i_is_that_of_seed_plus_i(run):
  _, both, _ = run(prompt='abc', seed=7, num_samples=2)
  first, second = (run(prompt='abc', seed=seed)[1] for seed in (7, 8))
  assert both == first + '\n\n' + second


def test_several_prompts_are_continued_as_each_alone(run, workdir, caplog):
  """In the order in which they were given; no length compiles anything."""
  prompts = ['abc', 'd', 'a longer']
  alone = [run(prompt=p, seed=s)[1] for p in prompts for s in (5, 6)]
  before = len((workdir / 'samples.jsonl').read_text().splitlines())
  code, text, report = run(prompt=prompts, num_samples=2)
  assert code == 0
  assert text == '\n\n'.join(alone)
  assert report.count('tokens/s') == 6
  rows = (workdir / 'samples.jsonl').read_text().splitlines()[before:]
  of_rows = [(row['prompt'], row['seed']) for row in map(json.loads, rows)]
  assert of_rows == [(p, s) for p in prompts for s in (5, 6)]
  with jax.log_compiles():
    assert run(prompt=['', 'xyz xyz'], num_samples=3)[0] == 0
  seen = [r.getMessage() for r in caplog.records]
  assert not [m for m in seen if m.startswith('Compiling')]


def test_an_empty_prompt_and_a_stop_string(run, workdir):
  flags = dict(prompt='', temperature=0, max_tokens=20)
  _, text, _ = run(**flags)
  row = json.loads((workdir / 'samples.jsonl').read_text().splitlines()[-1])
  stop = row['text'][1:3]
  assert stop
  _, cut, _ = run(**flags, stop=stop)
  assert cut == text[: text.index(stop)] + '\n'
  # Of several the first to appear counts.
  _, cut, _ = run(**flags, stop=[row['text'][3:], stop, '~~'])
  assert cut == text[: text.index(stop)] + '\n'
  row = json.loads((workdir / 'samples.jsonl').read_text().splitlines()[-1])
  assert row['stop'][1:] == [stop, '~~']


def test_a_sample_that_cannot_be_kept_is_shown(run, workdir):
  samples = workdir / 'samples.jsonl'
  _, text, report = run(prompt='abc')
  assert 'not kept' not in report
  kept = samples.rename(workdir / 'kept')
  samples.mkdir()
  try:
    code, again, report = run(prompt='abc')
  finally:
    samples.rmdir()
    kept.rename(samples)
  assert (code, again) == (0, text)
  assert report.count('\n') == 2
  assert "The sample was not kept: '" in report


def test_a_length_beyond_training_is_only_a_warning(run):
  code, _, report = run(prompt='def', max_tokens=17, temperature=0)
  assert code == 0
  assert report.startswith('warning: ')
  assert '21 tokens' in report


def test_a_prompt_from_a_file(run, workdir, tmp_path):
  text = tmp_path / 'book.txt'
  text.write_text('def')
  flags = dict(temperature=0, max_tokens=17)
  code, from_file, report = run(prompt_file=text, **flags)
  assert code == 0
  assert report.startswith('warning: ')
  _, whole, _ = run(prompt='def', **flags)
  assert whole == 'def' + from_file


def test_a_long_file_is_read_by_a_bounded_history(
  sparse_workdir, run, tmp_path, monkeypatch
):
  """And short ones by all there is; both give what the flag says."""
  monkeypatch.setattr(long_input, 'CHUNK', 16)
  monkeypatch.setattr(generate, '_SECONDS', 0.0)
  text = tmp_path / 'book.txt'
  # After all chunks a single token is left, which the step of drawing reads.
  text.write_text('one longer book ' * 17)
  flags = dict(workdir=sparse_workdir, prompt_file=text, temperature=0)
  code, written, report = run(**flags)
  assert code == 0
  # 16 tokens are 4 blocks: a sink, one of history, and two of the window.
  assert 'keeps 1 blocks of 4 tokens' in report
  assert '272 of 273 tokens read' in report
  assert 'warning' not in report
  assert run(**flags, history_blocks=1)[1] == written
  monkeypatch.undo()
  _, _, report = run(**flags, history_blocks=0, max_tokens=1)
  assert report.startswith('warning: ')
  row = json.loads(
    (sparse_workdir / 'samples.jsonl').read_text().splitlines()[-1]
  )
  assert row['prompt'] == text.read_text()


def test_a_workdir_does_not_choose_where_programs_come_from(run, workdir):
  """From there native code is loaded; its config.json may be anybody's."""
  assert workdir_lib.read_config(workdir).data.cache_dir == str(workdir)
  before = jax.config.jax_compilation_cache_dir
  try:
    run(prompt='abc')
    chosen = pathlib.Path(jax.config.jax_compilation_cache_dir)
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert chosen == pathlib.Path('~/.cache/jaxsparse/compiled').expanduser()
  assert not (workdir / 'compiled').exists()


def test_a_bench_builds_no_corpus_where_the_workdir_says(
  sparse_workdir, monkeypatch
):
  seen = []

  def build(config):
    seen.append(config.cache_dir)
    return SimpleNamespace(validation=[Piece(b'a text to read', True)])

  monkeypatch.setattr(corpus_lib, 'build_corpus', build)
  bench._of_run(argparse.Namespace(workdir=str(sparse_workdir), tokens=9))
  assert seen == [config.DataConfig.cache_dir]


def test_home(run, workdir, monkeypatch):
  text = workdir / 'prompt.txt'
  text.write_text('abc')
  monkeypatch.setenv('HOME', str(workdir.parent))
  code, _, _ = run(
    workdir=f'~/{workdir.name}', prompt_file=f'~/{workdir.name}/prompt.txt'
  )
  assert code == 0


def test_a_bounded_cache_is_of_one_size_for_every_length(sparse_workdir):
  model = workdir_lib.read_config(sparse_workdir).model
  model = long_input.with_bounded_history(model, 16)
  short, long = (
    jax.eval_shape(lambda n=n: init_cache(model, 1, n)) for n in (100, 10**6)
  )
  assert short['blocks'] == long['blocks']


def test_the_bench_tells_of_every_stretch(sparse_workdir, monkeypatch, capsys):
  monkeypatch.setattr(long_input, 'CHUNK', 16)
  text = [Piece(b'a text to read ' * 3, True)]
  monkeypatch.setattr(
    corpus_lib, 'build_corpus', lambda config: SimpleNamespace(validation=text)
  )
  options = dict(workdir=str(sparse_workdir), tokens=100, stretch=32)
  options = argparse.Namespace(**bench.OPTIONS | options)
  records = []
  Report('', {}).add(bench, vars(options), records)
  assert [r['task'] for r in records] == [
    f'tokens {i} to {i + 32}' for i in (0, 32, 64)
  ]
  # It repeats the 45 bytes, but no untrained model expects that.
  for r in records:
    assert r['nats_per_token'] == pytest.approx(np.log(257), rel=0.2)
    assert r['tokens_per_second'] > 0 < r['resident_bytes']
  assert 'to the first stretch, at most' in capsys.readouterr().out
  with pytest.raises(UserError, match='stretch must be at least 16'):
    list(bench.measure(argparse.Namespace(**vars(options) | dict(stretch=8))))


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (dict(prompt='a', prompt_file='b'), ['--prompt_file', 'both']),
    (dict(prompt_file='nothing.txt'), ['nothing.txt']),
    (dict(prompt_file='.'), ['--prompt_file=.', 'directory']),
    (dict(history_blocks=-1), ['history_blocks', '-1']),
    (dict(history_blocks=3), ['sparse', 'global']),
    (dict(workdir='nowhere'), ['workdir', 'nowhere']),
    (dict(workdir=None), ['--workdir']),
    (dict(step=4), ['step 4', '[3]']),
    (dict(max_tokens=0), ['max_tokens', '0']),
    (dict(max_tokens='many'), ['--max_tokens', 'many']),
    (dict(num_samples=0), ['num_samples', '0']),
    (dict(temperature=-1), ['temperature', '-1']),
    (dict(top_p=0), ['top_p', '0']),
    (dict(top_p=1.5), ['top_p', '1.5']),
    (dict(top_k=-2), ['top_k', '-2']),
    (dict(seed=-1), ['seed', '-1']),
    (dict(prompt='\udcff'), ['prompt', 'UTF-8']),
    (dict(stop='\udcff'), ['stop', 'UTF-8']),
    (dict(stop=''), ['stop', 'empty']),
    (dict(temperature='inf'), ['temperature', 'inf']),
    (dict(temperature='nan'), ['temperature', 'nan']),
    (dict(temperature='1e-38'), ['temperature', '1e-38']),
    (dict(seed=2**32 - 1, num_samples=2), ['seed', 'num_samples']),
    (dict(max_tokens=10**10), ['max_tokens', '32 bits']),
    (dict(max_tokens=2 * 10**9), ['max_tokens', 'GiB', 'would fit']),
    (dict(promt='x'), ['--promt']),
  ],
  ids=str,
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, flags, words):
  code, text, message = run(**flags)
  assert code == 2
  assert text == ''
  assert message.count('\n') == 1
  assert 'Traceback' not in message
  for word in words:
    assert word in message


def test_the_best_checkpoint(run, workdir):
  code, _, report = run(prompt='abc', step='best')
  assert code == 2
  assert 'has a validation loss' in report
  metrics = workdir / 'metrics.jsonl'
  metrics.write_text('{"step": 3, "validation_loss": 2.5}\n')
  code, _, _ = run(prompt='abc', step='best')
  metrics.unlink()
  assert code == 0
  code, _, report = run(prompt='abc', step='bets')
  assert code == 2
  assert "'bets'" in report
