# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in one sentence on stderr, exit code 2 and no traceback."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from etils import epath
from lanes import few

from jaxsparse.cli import generate, train
from jaxsparse.run import command_line, workdir_lock

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = """
from jaxsparse import config as c

def get_config():
  return c.Config(
    model=c.ModelConfig(memory=c.MemoryConfig()),
    data=c.DataConfig(text={text!r}, cache_dir={cache!r}),
  )
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Good and bad files to point flags at."""
  path = tmp_path_factory.mktemp('input')
  (path / 'recipe.py').write_text(
    RECIPE.format(text=str(path / 'good*.txt'), cache=str(path / 'cache'))
  )
  for i in range(4):
    (path / f'good{i}.txt').write_text(f'{i} is a number. ' * 100)
  (path / 'empty.txt').write_text('')
  (path / 'short.txt').write_text('x')
  (path / 'latin.txt').write_bytes('schöne Grüße'.encode('latin-1') * 50)
  (path / 'broken.json').write_text('{')
  chat = '[{"role": "user", "content": "%s"}, {"role": "assistant", '
  chat += '"content": "b"}]\n'
  (path / 'chat.jsonl').write_text(chat % 'a' + chat % 'c')
  (path / 'bad_chat.jsonl').write_text(chat % 'a' + '[{"role": "bot"}]')
  (path / 'broken.model').write_bytes(b'no model')
  (path / 'syntax.py').write_text('def get_config(:')
  (path / 'nothing.py').write_text('get_config = dict')
  (path / 'wrong.py').write_text(
    'from jaxsparse.config import *\n'
    'get_config = lambda: Config(model=ModelConfig(num_layers=0))'
  )
  (path / 'typed.py').write_text(
    'from jaxsparse.config import *\n'
    'get_config = lambda: Config(model=ModelConfig(num_layers=4.5))'
  )
  (path / 'other').mkdir()
  (path / 'other' / 'config.json').write_text('{"color": "green"}')
  return path


def ending(main, capsys):
  """The sentence with which `main` ends."""
  compiled = jax.config.jax_compilation_cache_dir
  try:
    with (
      pytest.raises(SystemExit) as ended,
      command_line.user_errors_end_in_a_sentence(),
    ):
      main()
  finally:
    jax.config.update('jax_compilation_cache_dir', compiled)
  error = capsys.readouterr().err
  assert ended.value.code == 2, error
  lines = [line for line in error.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1, error
  assert 'Traceback' not in error
  return lines[0]


C = '--config.'
# Flags beside a good recipe, and what the sentence must say.
TRAIN = {
  'unknown field': (C + 'model.nlayers=4', 'nlayers'),
  'unknown section': (C + 'models.num_layers=4', 'models'),
  'unknown flag': ('--wrokdir=x', 'wrokdir'),
  'stray word': ('now', "'now' is not a flag"),
  'word for a number': (
    C + 'model.num_layers=four',
    "whole number, got 'four'",
  ),
  'fraction of a layer': (
    C + 'model.num_layers=4.5',
    "whole number, got '4.5'",
  ),
  'no layers': (C + 'model.num_layers=0', 'num_layers must be positive'),
  'negative width': (C + 'model.model_dim=-1', 'model_dim must be positive'),
  'grouping': (C + 'model.num_kv_heads=3', 'must divide num_heads = 4, got 3'),
  'odd head': (C + 'model.head_dim=5', 'head_dim must be even, got 5'),
  'unknown MLP': (
    C + 'model.mlp=relu',
    "one of swiglu, gelu, gelu_erf; got 'relu'",
  ),
  'unknown type': (
    C + 'model.dtype=int8',
    "float32, bfloat16, float16; got 'int8'",
  ),
  'dropout': (C + 'model.dropout_rate=1', 'dropout_rate must be'),
  'small vocabulary': (C + 'model.vocab_size=100', "at least the tokenizer's"),
  'expansion': (C + 'model.memory.expansion=3', 'a perfect square, got 3'),
  'cores': (C + 'model.memory.num_cores=3', 'multiple of num_cores = 3'),
  'too many slots': (C + 'model.memory.num_selected=999', 'num_selected'),
  'late placement': (
    C + 'model.memory.placements=((1,9),)',
    'below num_layers = 4, got (1, 9)',
  ),
  'backward placement': (
    C + 'model.memory.placements=((2,1),)',
    '0 <= read <= write',
  ),
  'same read': (C + 'model.memory.placements=((1,2),(1,3))', 'different block'),
  'two sources': (C + 'data.tfds=lm1b', 'give one of text, tfds'),
  'no chat': (
    C + 'data.text= --config.data.messages={folder}/bad_chat.jsonl',
    'line 2 of',
  ),
  'no chat template': (
    C + 'data.text= --config.data.messages={folder}/chat.jsonl',
    'data.chat_template=FILE',
  ),
  'no such text': (C + 'data.text=nowhere/*.txt', 'nowhere/*.txt'),
  'empty text': (C + 'data.text={folder}/empty.txt', 'empty'),
  'short text': (C + 'data.text={folder}/short.txt', 'data.'),
  'not UTF-8': (C + 'data.text={folder}/latin.txt', 'UTF-8'),
  'no such tokenizer': (C + 'data.tokenizer=no.json', 'no.json'),
  'broken tokenizer': (
    C + 'data.tokenizer={folder}/broken.json',
    'broken.json',
  ),
  'broken model': (C + 'data.tokenizer={folder}/broken.model', 'broken.model'),
  'cache in a file': (C + 'data.cache_dir={folder}/good0.txt', 'cache_dir'),
  'split': (C + 'data.split=lines', 'one of auto, file, bytes'),
  'no validation': (C + 'data.validation_fraction=0', 'validation_fraction'),
  'lanes': (C + 'data.num_lanes=3', 'num_lanes must divide batch_size = 16'),
  'accumulation': (C + 'optimizer.grad_accumulation=5', 'grad_accumulation'),
  'batch on the mesh': (C + 'data.batch_size=12', 'must be a multiple of'),
  'no devices': (C + 'mesh.model=0', 'mesh.model must be positive, got 0'),
  'too many devices': (C + 'mesh.model=16', 'must make up the 8 devices'),
  'heads on the mesh': (C + 'mesh.model=8', 'num_heads must be a multiple'),
  'rows on the mesh': (
    C + 'model.memory.num_keys=31 ' + C + 'model.memory.table.scheme=grid',
    'must divide the 961 rows',
  ),
  'columns on the mesh': (
    C
    + 'mesh.sparse=8 '
    + C
    + 'model.memory.value_dim=4 '
    + C
    + 'model.memory.table.scheme=columns',
    'value_dim = 4',
  ),
  'unknown scheme': (
    C + 'model.memory.table.scheme=hash',
    'columns, rows, grid',
  ),
  'former name': (
    C + 'model.memory.scheme=rows',
    'model.memory.scheme is --config.model.memory.table.scheme now',
  ),
  'unknown sum': (C + 'model.memory.table.gradient=atomic', 'deterministic'),
  'unknown optimizer': (C + 'optimizer.value_optimizer=sgd', 'row_adagrad'),
  'decay of adagrad': (
    C
    + 'optimizer.value_optimizer=row_adagrad '
    + C
    + 'optimizer.value_weight_decay=0.1',
    'value_weight_decay must be 0',
  ),
  'moments of row_adam': (
    C + 'optimizer.value_optimizer=row_adam ' + C + 'optimizer.b1=0.98',
    'b1 must be below',
  ),
  'memory without a layer': (
    C
    + 'model.memory.placements=() '
    + C
    + 'optimizer.value_optimizer=row_adam',
    'placements must name a (read, write) pair',
  ),
  'NUL in a folder': ('--workdir=a\0b', 'must not hold the NUL character'),
  'NUL in a path': (C + 'data.text=a\0b', 'text must not hold the NUL'),
  'NUL in the cache': (C + 'data.cache_dir=\0', 'cache_dir must not hold'),
  'unknown store': ('--workdir=nowhere://x', "can't be reached"),
  'no number': (C + 'optimizer.learning_rate=nan', 'a finite number, got nan'),
  'too many layers': (C + 'model.num_layers=1000000', 'at most 10,000'),
  'too many words': (C + 'model.vocab_size=99999999999', 'at most 2,147,483'),
  'tuples': (C + 'model.attention_pattern=[[1,2]]', 'must be a tuple (text'),
  'no name': (C + '=1', 'there is no field --config.;'),
  'no part': (C + '.x=1', 'there is no field --config..x;'),
  'setting without use': (
    C + 'model.window=9',
    'window = 9 does nothing with attention_pattern',
  ),
  'no cluster': ('--distributed', 'found no cluster'),
  'one of three flags': ('--num_processes=2', 'belong together, got 2 only'),
  'process too many': (
    '--coordinator=localhost:1234 --num_processes=2 --process_id=2',
    '--process_id must be 0 to 1',
  ),
  'no port': (
    '--coordinator=localhost --num_processes=2 --process_id=1',
    '--coordinator must be HOST:PORT',
  ),
  'rate': (C + 'optimizer.learning_rate=0', 'learning_rate must be positive'),
  'sample': (
    C + 'train.sample_tokens=10000000000',
    'sample_tokens must be at most 2,147,483,647',
  ),
  'steps': (C + 'train.num_steps=0', 'num_steps must be positive'),
  'seed': (C + 'train.seed=-1', 'seed must not be negative'),
  'workdir not UTF-8': ('--workdir={folder}/\udcff', 'must be UTF-8'),
  'workdir is a file': ('--workdir={folder}/good0.txt', 'good0.txt'),
  'workdir of something else': ('--workdir={folder}/other', 'saved config'),
}


@pytest.mark.parametrize('name', TRAIN)
def test_train(name, folder, tmp_path, capsys):
  flag, said = TRAIN[name]
  argv = [f'--config={folder}/recipe.py', f'--workdir={tmp_path}/w']
  flags = flag.format(folder=folder).split(' ')
  assert said in ending(lambda: train.main([*argv, *flags]), capsys)


def test_a_workdir_in_use(folder, tmp_path, capsys):
  flags = [f'--config={folder}/recipe.py', f'--workdir={tmp_path}/w']
  with workdir_lock.held(tmp_path / 'w'):
    before = sorted(tmp_path.rglob('*'))
    assert 'is in use by process' in ending(lambda: train.main(flags), capsys)
    assert sorted(tmp_path.rglob('*')) == before


CONFIGS = {
  'none': ([], '--config=FILE is missing'),
  'no file': (['--config=configs/none.py'], 'configs/none.py is no file'),
  'syntax': (['--config={folder}/syntax.py'], 'could not be read (SyntaxError'),
  'no Config': (['--config={folder}/nothing.py'], 'must return a jaxsparse'),
  'bad value': (['--config={folder}/wrong.py'], 'num_layers must be positive'),
  'no workdir': (
    ['--config={folder}/recipe.py'],
    '--workdir=FOLDER is missing',
  ),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_recipes(name, folder, tmp_path, capsys):
  flags, said = CONFIGS[name]
  flags = [flag.format(folder=folder) for flag in flags]
  if name != 'no workdir':
    flags.append(f'--workdir={tmp_path}')
  assert said in ending(lambda: train.main(flags), capsys)


GENERATE = {
  'no such workdir': (['--workdir={folder}/none'], 'holds no config.json'),
  'no workdir': ([], 'workdir'),
  'length': (['--max_tokens=0'], 'max_tokens'),
  'heat': (['--temperature=-1'], 'temperature'),
  'nucleus': (['--top_p=1.5'], 'top_p'),
  'top-k': (['--top_k=-2'], 'top_k'),
  'word': (['--max_tokens=many'], "invalid int value: 'many'"),
  'typo': (['--max_tokns=3'], '(did you mean --max_tokens?)'),
  'NUL': (['--prompt_file=a\0b'], 'must not hold the NUL character'),
  'unknown store': (['--workdir=nowhere://x'], "can't be reached"),
}


@pytest.mark.parametrize('name', GENERATE)
def test_generate(name, folder, capsys):
  flags, said = GENERATE[name]
  flags = [flag.format(folder=folder) for flag in flags]
  if flags and 'workdir' not in flags[0]:
    flags.append(f'--workdir={folder}')
  assert said in ending(lambda: generate.main(flags), capsys)


def test_a_store_without_its_library(monkeypatch, capsys):
  def exists(path):
    raise ImportError('Please install gcsfs to access Google Storage')

  monkeypatch.setattr(type(epath.Path('gs://x')), 'exists', exists)
  said = ending(lambda: generate.main(['--workdir=gs://x']), capsys)
  assert "'gs://x' can't be reached (ImportError: Please install gcsfs" in said


@pytest.mark.parametrize(
  'error', [RuntimeError('no\nlibtpu'), AssertionError()]
)
def test_a_platform_that_is_not_there(error, monkeypatch, capsys):
  """What JAX 0.10 raises without a TPU, and without a GPU."""

  def devices():
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  said = ending(jax.devices, capsys)
  assert 'JAX_PLATFORMS=cpu asks for devices that JAX does not find' in said


def test_other_errors_keep_their_traceback():
  with (
    pytest.raises(RuntimeError, match='a defect'),
    command_line.user_errors_end_in_a_sentence(),
  ):
    raise RuntimeError('a defect')


PROCESSES = {
  'no workdir': ['train.py', '--config=configs/ultramem.py:tiny'],
  # Under pytest the types of arguments are checked before our code runs.
  'bad type': [
    'train.py',
    '--config={folder}/typed.py',
    '--workdir={folder}/w',
  ],
  'no such platform': [
    'train.py',
    '--config=dense:tiny',
    '--workdir={folder}/w',
  ],
  'no such run': ['-m', 'jaxsparse', 'generate', '--workdir=nowhere'],
}


@pytest.mark.parametrize('name', few(['no such run'], PROCESSES))
def test_as_a_process(name, folder):
  command = [part.format(folder=folder) for part in PROCESSES[name]]
  done = subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env=os.environ
    | dict(JAX_PLATFORMS='none_such' if 'plat' in name else 'cpu'),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert re.fullmatch(r'error: [^\n]+\.\n', done.stderr)
