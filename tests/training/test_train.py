# SPDX-License-Identifier: Apache-2.0
"""train.py as a user runs it: kills, signals, damage, divergence, resume."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

RECIPE = """
from jaxsparse import config as c

def get_config():
  return c.Config(
    model=c.ModelConfig(
      num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
      mlp_dim=32,
      memory=c.MemoryConfig(
        num_keys=8, key_dim=4, num_selected=4, value_dim=4,
        table=c.TableConfig(dtype='bfloat16'),
        placements=((0, 1),),
      ),
    ),
    data=c.DataConfig(
      seq_len=32, batch_size=4, text={text!r}, cache_dir={cache!r},
      validation_fraction=0.1,
    ),
    optimizer=c.OptimizerConfig(warmup_steps=2),
    train=c.TrainConfig(
      num_steps=40, log_every=1, save_every=5, sample_tokens=8
    ),
  )
"""


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
  """A recipe of a tiny model on a text of a few documents."""
  folder = tmp_path_factory.mktemp('recipe')
  rng = random.Random(0)
  for i in range(20):
    words = (
      rng.choice(['alpha', 'beta', 'gamma', 'delta', 'ἕν']) for _ in range(300)
    )
    (folder / f'{i}.txt').write_text(' '.join(words), encoding='utf-8')
  path = folder / 'tiny.py'
  path.write_text(
    RECIPE.format(text=str(folder / '*.txt'), cache=str(folder / 'cache'))
  )
  return path


def start(recipe, workdir, *flags):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, 'train.py', f'--config={recipe}']
  return subprocess.Popen(
    [*command, f'--workdir={workdir}', *flags],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, code=0):
  out, err = process.communicate()
  assert process.returncode == code, (out, err)
  return out, err


def rows(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  found = []
  for line in lines:
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return found


def losses(workdir):
  return {r['step']: r['loss'] for r in rows(workdir) if 'loss' in r}


def wait_for_step(process, workdir, step):
  while max(losses(workdir), default=0) < step:
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


@pytest.fixture(scope='module')
def whole(recipe, tmp_path_factory):
  """A run from start to end."""
  workdir = tmp_path_factory.mktemp('whole')
  out, _ = finish(start(recipe, workdir))
  return workdir, out


def test_a_whole_run(whole):
  workdir, out = whole
  assert sorted(losses(workdir)) == list(range(1, 41))
  assert losses(workdir)[40] < losses(workdir)[1]
  last = rows(workdir)[-1]
  assert last['step'] == 40
  assert last['validation_bits_per_byte'] > 0
  for said in (
    'Compiling training ...',
    'bits/byte',
    'tokens/s',
    'gzip -9',
    'xz -9',
    'plots',
  ):
    assert said in out
  # There is but one device.
  assert 'value tables split' not in out
  for name in ('training', 'slot_usage'):
    picture = (workdir / 'plots' / f'{name}.png').read_bytes()
    assert picture.startswith(b'\x89PNG')
  assert list((workdir / 'tensorboard').iterdir())
  assert (workdir / 'samples.jsonl').read_text().count('\n') == 1


@pytest.mark.slow
def test_killed_at_random_moments(recipe, whole, tmp_path):
  rng = random.Random(1)
  # Where no sample can be kept, all else is.
  (tmp_path / 'samples.jsonl').mkdir()
  for _ in range(2):
    process = start(recipe, tmp_path)
    target = max(losses(tmp_path), default=0) + rng.randint(1, 9)
    wait_for_step(process, tmp_path, min(target, 35))
    time.sleep(rng.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  out, _ = finish(start(recipe, tmp_path))
  assert losses(tmp_path) == losses(whole[0])
  assert rows(tmp_path)[-1] == rows(whole[0])[-1]
  assert "samples.jsonl' can't be written" in out
  assert (tmp_path / 'plots' / 'training.png').exists()


@pytest.mark.slow
def test_another_runs_parameters_trained_in_part(recipe, whole, tmp_path):
  """By rows, and killed: before the first checkpoint, and after it."""
  flags = (
    f'--config.train.start_from={whole[0]}',
    f'--config.data.text={recipe.parent}/1*.txt',
    '--config.optimizer.trained=attention|value_table',
    '--config.optimizer.value_optimizer=row_adam',
    '--config.train.num_steps=20',
  )
  calm, killed = tmp_path / 'calm', tmp_path / 'killed'
  out, _ = finish(start(recipe, calm, *flags))
  assert f'Beginning with step 40 of {str(whole[0])!r}.' in out
  assert "optimizer.trained = 'attention|value_table' trains" in out
  assert losses(calm)[1] < losses(whole[0])[1] - 1
  for step in (2, 12):
    process = start(recipe, killed, *flags)
    wait_for_step(process, killed, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  finish(start(recipe, killed, *flags))
  assert losses(killed) == losses(calm)
  assert rows(killed)[-1] == rows(calm)[-1]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGUSR1'])
def test_signals_save_and_exit_with_0(recipe, whole, tmp_path, name):
  process = start(recipe, tmp_path, '--config.train.save_every=1000')
  wait_for_step(process, tmp_path, 3)
  process.send_signal(getattr(signal, name))
  out, _ = finish(process)
  assert f'{name}: saved step' in out
  stopped = max(losses(tmp_path))
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == [
    str(stopped)
  ]
  # Another number of steps between saves is no other model.
  out, _ = finish(start(recipe, tmp_path))
  assert 'Changed since the last start: train.save_every: 1000 -> 5.' in out
  assert f'Going on from the checkpoint of step {stopped}.' in out
  assert losses(tmp_path) == losses(whole[0])


@pytest.mark.slow
def test_damaged_checkpoint_and_more_steps(recipe, tmp_path):
  finish(start(recipe, tmp_path, '--config.train.num_steps=10'))
  newest = tmp_path / 'checkpoints' / '10' / 'params'
  files = [p for p in newest.rglob('d/*') if p.is_file()]
  max(files, key=lambda p: p.stat().st_size).write_bytes(b'')
  out, _ = finish(start(recipe, tmp_path, '--config.train.num_steps=12'))
  assert 'The checkpoint of step 10 is damaged' in out
  assert 'Going on from the checkpoint of step 5.' in out
  assert sorted(losses(tmp_path)) == list(range(1, 13))


def test_another_model_is_refused(recipe, whole):
  workdir, _ = whole
  before = (workdir / 'config.json').read_text()
  process = start(
    recipe, workdir, '--config.model.mlp_dim=48', '--config.train.seed=3'
  )
  _, err = finish(process, 2)
  assert 'model.mlp_dim: 32 -> 48; train.seed: 0 -> 3' in err
  assert (workdir / 'config.json').read_text() == before


@pytest.mark.slow
def test_a_damaged_run_goes_on_elsewhere(recipe, whole, tmp_path):
  """Moved text, another batch size, more steps; small files are damaged."""
  workdir, moved = tmp_path / 'run', tmp_path / 'moved'
  shutil.copytree(whole[0], workdir)
  moved.mkdir()
  for path in recipe.parent.glob('*.txt'):
    shutil.copy(path, moved)
  (workdir / 'config.json').write_bytes(bytes(100))
  with (workdir / 'metrics.jsonl').open('ab') as file:
    file.write(b'7\n\xff')
  shutil.rmtree(workdir / 'plots')
  for name in ('plots', 'validation_pass.npz'):
    (workdir / name).write_text('no folder, no archive')
  (workdir / 'samples.jsonl').unlink()
  (workdir / 'samples.jsonl').mkdir()
  out, _ = finish(
    start(
      recipe,
      workdir,
      f'--config.data.text={moved}/*.txt',
      '--config.data.batch_size=6',
      '--config.train.num_steps=42',
    )
  )
  for said in (
    "config.json' is damaged: taken from the newest checkpoint",
    'data.batch_size: 4 -> 6 (each lane of the data goes on',
    'train.num_steps: 40 -> 42',
    'Going on from the checkpoint of step 40.',
    'Changed since then: the learning rate at step 40: 0.0003 -> 0.000',
    '1 lines of ',
    "can't be written (Is a directory)",
    'No pictures: ',
  ):
    assert said in out
  assert sorted(losses(workdir)) == list(range(1, 43))
  config = json.loads((workdir / 'config.json').read_text())
  assert config['data']['batch_size'] == 6

  _, err = finish(
    start(recipe, workdir, '--config.data.validation_fraction=0.2'), 2
  )
  assert 'another text, or with another split' in err
  assert json.loads((workdir / 'config.json').read_text()) == config


@pytest.mark.slow
def test_a_loss_that_is_not_finite(recipe, tmp_path):
  finish(start(recipe, tmp_path, '--config.train.num_steps=5'))
  _, err = finish(
    start(
      recipe,
      tmp_path,
      '--config.optimizer.learning_rate=1e38',
      '--config.optimizer.weight_decay=1e3',
    ),
    2,
  )
  assert 'Traceback' not in err
  assert 'the last good state kept is step 5' in err
  finish(start(recipe, tmp_path, '--config.train.num_steps=7'))
  assert sorted(losses(tmp_path)) == list(range(1, 8))
