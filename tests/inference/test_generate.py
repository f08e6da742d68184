"""The command: text on stdout, one sentence for bad input, samples kept."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxsparse import checkpoint, config, generate, saved_config
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.nn.transformer import Transformer

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
  folder = tmp_path_factory.mktemp('run')
  whole = config.Config(
    model=MODEL, data=config.DataConfig(seq_len=16, cache_dir=str(folder))
  )
  (folder / 'config.json').write_text(saved_config.to_json(whole))
  ByteTokenizer().save(folder)
  one = jnp.ones((1, 2), jnp.int32)
  init = jax.jit(Transformer(MODEL).init)
  params = init(jax.random.key(0), one, one, one)['params']
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  checkpoints.save(3, params, {'step': jnp.int32(3)}, {})
  checkpoints.close()
  return folder


@pytest.fixture
def run(workdir, capsys):
  """(flags of one call) -> exit code, stdout, stderr."""

  def call(**flags):
    flags = dict(workdir=workdir, max_tokens=6) | flags
    argv = [f'--{k}={v}' for k, v in flags.items() if v is not None]
    code = 0
    try:
      generate.main(argv)
    except SystemExit as exit_:
      code = exit_.code
    return code, *capsys.readouterr()

  return call


def test_the_same_seed_writes_the_same_text(run, workdir):
  code, text, report = run(prompt='dé', seed=5, top_k=20, top_p=0.9)
  assert code == 0
  assert text.startswith('dé')
  assert 'tokens/s' in report
  assert run(prompt='dé', seed=5, top_k=20, top_p=0.9)[1] == text
  row = json.loads((workdir / 'samples.jsonl').read_text().splitlines()[-1])
  assert row['step'] == 3
  assert row['seed'] == 5
  assert row['prompt'] + row['text'] + '\n' == text


def test_sample_i_is_that_of_seed_plus_i(run):
  _, both, _ = run(prompt='a', seed=7, num_samples=2)
  first, second = (run(prompt='a', seed=seed)[1] for seed in (7, 8))
  assert both == first + '\n\n' + second


def test_an_empty_prompt_and_a_stop_string(run, workdir):
  _, text, _ = run(prompt='', temperature=0, seed=1)
  row = json.loads((workdir / 'samples.jsonl').read_text().splitlines()[-1])
  stop = row['text'][1:3]
  assert stop
  _, cut, _ = run(prompt='', temperature=0, seed=1, stop=stop)
  assert cut == text[: text.index(stop)] + '\n'


def test_a_length_beyond_training_is_only_a_warning(run):
  code, _, report = run(prompt='def ', max_tokens=30, temperature=0)
  assert code == 0
  assert report.startswith('warning: ')
  assert '35 tokens' in report


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
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
