# SPDX-License-Identifier: Apache-2.0
"""Two processes train one adapter, and either goes on for the other.

In the slow lane, as each start of train.py compiles.
"""

import shutil

import numpy as np
import pytest
from processes import finish, losses, start, start_two

from jaxsparse.run import adapter_files

pytestmark = pytest.mark.slow

RECIPE = """
from jaxsparse import config as c

def get_config():
  return c.Config(
    model=c.ModelConfig(
      num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
      mlp_dim=16, memory=c.MemoryConfig.memory_plus(
        num_keys=8, key_dim=8, num_heads=1, num_selected=4, value_dim=16,
        placements=((0, 0), (1, 1)), replaces_mlp=False,
      ),
    ),
    data=c.DataConfig(
      seq_len=32, batch_size=4, text={text!r}, cache_dir={cache!r},
      validation_fraction=0.1,
    ),
    optimizer=c.OptimizerConfig(warmup_steps=2, learning_rate=0.05),
    train=c.TrainConfig(
      num_steps=6, log_every=1, save_every=3, sample_tokens=0
    ),
  )
"""
KINDS = dict(
  lora=['--config.adapter.kind=lora', '--config.adapter.rank=2'],
  rows=[
    '--config.adapter.kind=rows',
    '--config.adapter.num_rows=20',
    '--config.adapter.ranking_unit=8',
  ],
)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The recipe, the workdir of a trained base, and flags of a new text."""
  folder = tmp_path_factory.mktemp('adapters')
  rng = np.random.default_rng(0)
  for name, letters in (('old', 'abcdefg'), ('new', 'fghijkl')):
    (folder / name).mkdir()
    for i in range(20):
      text = ''.join(rng.choice(list(letters), 600))
      (folder / name / f'{i}.txt').write_text(text)
  recipe = folder / 'recipe.py'
  recipe.write_text(
    RECIPE.format(text=str(folder / 'old/*.txt'), cache=str(folder / 'cache'))
  )
  finish(start(recipe, folder / 'base', 2))
  flags = (
    f'--config.train.start_from={folder / "base"}',
    f'--config.data.text={folder / "new/*.txt"}',
  )
  return recipe, flags


def adapter_of(workdir):
  return adapter_files.read(adapter_files.folder_of(workdir, 'adapter'))


def close(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=0, atol=2e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_train_one_adapter(base, tmp_path, kind):
  recipe, flags = base
  flags = *flags, *KINDS[kind]
  one, two = tmp_path / 'one', tmp_path / 'two'
  finish(start(recipe, one, 2, *flags))
  lead, follower = finish(*start_two(recipe, two, 1, *flags))
  assert 'parameters are trained, in' in lead
  assert 'parameters are trained' not in follower
  expected, (tensors, meta) = losses(one), adapter_of(one)
  assert sorted(expected) == [1, 2, 3, 4, 5, 6]
  for step, loss in losses(two).items():
    np.testing.assert_allclose(loss, expected[step], rtol=0, atol=1e-4)
  found, of_two = adapter_of(two)
  close(found, tensors)
  assert (of_two['base'], of_two['steps']) == (meta['base'], 6)
  # What two processes saved at step 3 one takes on, on another mesh, and two
  # what one has saved.
  mesh = ['--config.mesh.sparse=2', '--config.mesh.data=1']
  for workdir, go_on in (
    (two, lambda: start(recipe, two, 2, *flags, *mesh)),
    (one, lambda: start_two(recipe, one, 1, *flags, *mesh)),
  ):
    shutil.rmtree(workdir / 'checkpoints' / '6')
    shutil.rmtree(workdir / 'adapters')
    started = go_on()
    started = started if isinstance(started, list) else [started]
    output, *_ = finish(*started)
    assert 'Going on from the checkpoint of step 3' in output
    close(adapter_of(workdir)[0], tensors)
