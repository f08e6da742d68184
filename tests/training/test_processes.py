"""Two processes of four devices train as one process of eight.

In the slow lane, as four starts of train.py compile for minutes: of
`ultramem_tiny` and of a model that compiles faster.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]

# `ultramem_tiny` on a text that is validated in no time.
SMALL = """
  model = dataclasses.replace(
    recipe.model, num_layers=2, model_dim=64, mlp_dim=64, num_heads=2,
    num_kv_heads=2, memory=dataclasses.replace(
      recipe.model.memory, num_keys=32, num_selected=4, placements=((0, 1),)
    ),
  )
"""
RECIPE = """
import dataclasses, runpy
from jaxsparse import config as c

def get_config():
  recipe = runpy.run_path({recipe!r})['get_config']()
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


@pytest.fixture(params=['small', 'ultramem_tiny'])
def recipe(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('processes')
  numbers = np.random.default_rng(0).integers(1000, size=(40, 800))
  for i, row in enumerate(numbers):
    (folder / f'{i}.txt').write_text(' '.join(map(str, row)))
  path = folder / 'recipe.py'
  path.write_text(
    RECIPE.format(
      recipe=str(ROOT / 'configs/ultramem_tiny.py'),
      small=SMALL if request.param == 'small' else '',
      text=str(folder / '*.txt'),
      cache=str(folder / 'cache'),
    )
  )
  return path


def start(recipe, workdir, num_devices, *flags):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(num_devices),
  }
  return subprocess.Popen(
    [sys.executable, ROOT / 'train.py', f'--config={recipe}',
     f'--workdir={workdir}', *flags],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )  # fmt: skip


def finish(*processes):
  outputs = [process.communicate()[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output
  return outputs


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


def scheme(name, data, sparse):
  return (
    f'--config.model.memory.scheme={name}',
    f'--config.mesh.data={data}',
    f'--config.mesh.sparse={sparse}',
  )


def test_two_processes_are_one_and_either_goes_on_for_the_other(
  recipe, tmp_path
):
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(start(recipe, one, 8, *scheme('columns', 2, 4)))
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  flags = (f'--coordinator={address}', '--num_processes=2')
  lead, follower = finish(
    *(
      start(recipe, two, 4, *scheme('grid', 2, 4), *flags, f'--process_id={i}')
      for i in range(2)
    )
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
