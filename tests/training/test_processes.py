# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one, and end and start again as one.

In the slow lane, as each start of train.py compiles: `ultramem:tiny` and a
model that compiles faster.
"""

import random
import re
import signal
import time

import numpy as np
import pytest
from processes import finish, losses, start, start_two

pytestmark = pytest.mark.slow

# `ultramem:tiny` on a text that is validated in no time.
SMALL = """
  model = dataclasses.replace(
    recipe.model, num_layers=2, model_dim=64, mlp_dim=64, num_heads=2,
    num_kv_heads=2, memory=dataclasses.replace(
      recipe.model.memory, num_keys=32, num_selected=4, placements=((0, 1),)
    ),
  )
"""
RECIPE = """
import dataclasses
from jaxsparse import config as c
from jaxsparse.run import recipe_files

def get_config():
  recipe = recipe_files.shipped('ultramem:tiny')
  model = recipe.model
{small}
  return dataclasses.replace(
    recipe,
    model=model,
    data=dataclasses.replace(
      recipe.data, text={text!r}, cache_dir={cache!r}, prefetch=0
    ),
    train=c.TrainConfig(
      num_steps=6, log_every=1, save_every=3, sample_tokens=0
    ),
    optimizer=dataclasses.replace(recipe.optimizer, warmup_steps=5),
  )
"""


@pytest.fixture(params=['small', 'ultramem:tiny'])
def recipe(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  numbers = np.random.default_rng(0).integers(1000, size=(40, 800))
  for i, row in enumerate(numbers):
    (folder / f'{i}.txt').write_text(' '.join(map(str, row)))
  path = folder / 'recipe.py'
  path.write_text(
    RECIPE.format(
      small=SMALL if request.param == 'small' else '',
      text=str(folder / '*.txt'),
      cache=str(folder / 'cache'),
    )
  )
  return path


def scheme(name, data, sparse):
  return (
    f'--config.model.memory.table.scheme={name}',
    f'--config.mesh.data={data}',
    f'--config.mesh.sparse={sparse}',
  )


def test_two_processes_are_one_and_either_goes_on_for_the_other(
  recipe, tmp_path
):
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(start(recipe, one, 8, *scheme('columns', 2, 4)))
  lead, follower = finish(
    *start_two(recipe, two, 4, *scheme('grid', 2, 4)),
  )
  assert 'split by grid' in lead
  assert 'loss' not in follower
  expected = losses(one)
  assert sorted(expected) == [1, 2, 3, 4, 5, 6]
  for step, loss in losses(two).items():
    np.testing.assert_allclose(loss, expected[step], rtol=0, atol=1e-5)

  # What two processes saved at step 3, one takes on by rows.
  (two / 'checkpoints' / '6').rename(tmp_path / 'aside')
  (output,) = finish(start(recipe, two, 8, *scheme('rows', 1, 8)))
  assert 'Going on from the checkpoint of step 3' in output
  assert 'split by rows' in output
  for step, loss in losses(two).items():
    np.testing.assert_allclose(loss, expected[step], rtol=0, atol=1e-5)


# Trains in no time, so that a kill meets any part of it.
TINY = """
from jaxsparse import config as c

def get_config():
  return c.Config(
    model=c.ModelConfig(
      num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
      mlp_dim=16,
    ),
    data=c.DataConfig(
      seq_len=32, batch_size=4, text={text!r}, cache_dir={cache!r},
      validation_fraction=0.1,
    ),
    optimizer=c.OptimizerConfig(warmup_steps=2),
    train=c.TrainConfig(
      num_steps=60, log_every=1, save_every=2, eval_every=30, sample_tokens=0,
    ),
  )
"""


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tiny')
  numbers = np.random.default_rng(0).integers(1000, size=(20, 300))
  for i, row in enumerate(numbers):
    (folder / f'{i}.txt').write_text(' '.join(map(str, row)))
  path = folder / 'recipe.py'
  path.write_text(
    TINY.format(text=str(folder / '*.txt'), cache=str(folder / 'cache'))
  )
  return path


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory):
  """The losses of two processes that nothing stops."""
  workdir = tmp_path_factory.mktemp('whole')
  finish(*start_two(tiny, workdir, 1))
  return losses(workdir)


def last_step(workdir):
  return max(losses(workdir), default=0)


def wait_until(condition, *processes):
  while not condition():
    for process in processes:
      assert process.poll() is None, process.communicate()
    time.sleep(0.02)


def saving(workdir):
  """Whether a checkpoint is being written."""
  folder = workdir / 'checkpoints'
  return any('tmp' in path.name for path in folder.glob('*'))


def kill_one(processes, victim):
  """Kills it; the other's sentence, which comes within seconds."""
  processes[victim].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  output, _ = processes[1 - victim].communicate(timeout=60)
  processes[victim].communicate()
  assert time.monotonic() - begin < 20
  assert f'error: process {victim} of 2 has ended without a word' in output
  assert processes[1 - victim].returncode == 1, output


def began(workdir):
  """Changes when a start has come to its first step."""
  path = workdir / 'metrics.jsonl'
  return path.stat().st_ino if path.exists() else 0


def test_one_of_two_is_killed_at_any_moment(tiny, whole, tmp_path):
  rng = random.Random(3)
  for attempt in range(6):
    before = began(tmp_path)
    processes = start_two(tiny, tmp_path, 1)
    if not attempt:
      # They have met, and load, compile and begin; before, they would wait.
      wait_until((tmp_path / 'config.json').exists, *processes)
      time.sleep(rng.random() * 2)
    else:
      wait_until(lambda old=before: began(tmp_path) != old, *processes)
      if attempt % 2:
        wait_until(lambda: saving(tmp_path), *processes)
      else:
        goal = last_step(tmp_path) + rng.randint(1, 7)
        wait_until(lambda goal=goal: last_step(tmp_path) >= goal, *processes)
      time.sleep(rng.random() * 0.05)
    kill_one(processes, rng.randrange(2))
  assert 0 < last_step(tmp_path) < 60
  finish(*start_two(tiny, tmp_path, 1))
  assert losses(tmp_path) == whole


def test_one_goes_on_alone_where_one_of_two_was_killed(tiny, whole, tmp_path):
  processes = start_two(tiny, tmp_path, 1)
  wait_until(lambda: last_step(tmp_path) >= 9, *processes)
  kill_one(processes, 0)
  finish(start(tiny, tmp_path, 2))
  found = losses(tmp_path)
  assert sorted(found) == sorted(whole)
  for step, loss in found.items():
    np.testing.assert_allclose(loss, whole[step], rtol=0, atol=1e-5)


@pytest.mark.parametrize('index', [0, 1])
def test_a_signal_to_one_of_two_saves_both(tiny, tmp_path, index):
  """Long before the next metrics line."""
  every = 1_000_000
  processes = start_two(
    tiny, tmp_path, 1, f'--config.train.save_every={every}',
    f'--config.train.log_every={every}', f'--config.train.num_steps={every}',
    '--config.train.eval_every=0',
  )  # fmt: skip
  wait_until(lambda: last_step(tmp_path) >= 1, *processes)
  processes[index].send_signal(signal.SIGUSR1)
  begin = time.monotonic()
  lead, _ = finish(*processes)
  assert time.monotonic() - begin < 40
  (saved,) = re.findall(r'SIGUSR1: saved step (\d+) of', lead)
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == [saved]


def test_the_failure_of_one_ends_both(tiny, tmp_path):
  lead, other = start_two(tiny, tmp_path, 1, '--config.data.num_lanes=1')
  for process in lead, other:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert 'data.num_lanes = 1 must be a multiple of the 2 processes' in output
    assert 'Traceback' not in output


def test_processes_of_different_commands_are_told(tiny, tmp_path):
  lead, other = start_two(tiny, tmp_path, 1)
  other.kill()
  address = next(a for a in lead.args if str(a).startswith('--coordinator'))
  another = start(
    tiny, tmp_path, 1, address, '--num_processes=2', '--process_id=1',
    '--config.model.mlp_dim=32',
  )  # fmt: skip
  for process in lead, another:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert 'process 1 of 2 has another config (model.mlp_dim: 16 ->' in output
    assert 'Traceback' not in output
