# SPDX-License-Identifier: Apache-2.0
"""Runs of an adapter: begun, killed, resumed, read, and their base unharmed."""

import contextlib
import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.small_run import draw_params, save_untrained
from small_model import Batches, make_mesh

from jaxsparse import config as c
from jaxsparse.config.errors import UserError
from jaxsparse.inference import adapters as inference_adapters
from jaxsparse.inference import weights
from jaxsparse.nn import adapters as trees
from jaxsparse.run import adapter_files, checkpoint, stored
from jaxsparse.run.progress import Reporter
from jaxsparse.training import evaluation, loop, resume, start_from

MODEL = c.ModelConfig(
  num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=8, vocab_size=257,
)  # fmt: skip
ONE = (1, 1, 1)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('base'), MODEL, 0.3)


def of(folder, model=MODEL, **adapter):
  settings = dict(kind='lora', rank=2, name='new_words') | adapter
  return c.Config(
    model=model,
    data=c.DataConfig(batch_size=2, seq_len=16),
    optimizer=c.OptimizerConfig(warmup_steps=1),
    train=c.TrainConfig(
      num_steps=4, save_every=2, log_every=1, start_from=str(folder)
    ),
    adapter=c.AdapterConfig(**settings),
  )


class Killed(Batches):
  """As if the process ended while it waits for a batch."""

  def __next__(self):
    if self.step == 3:
      raise KeyboardInterrupt
    return super().__next__()


def fit(config, workdir, batches=Batches, shape=ONE):
  """As the command trains."""
  opened, _ = resume.open_workdir(config, workdir)
  opened = start_from.begin(opened, workdir, lambda _: None)
  resume.save_config(opened, workdir)
  data = loop.TrainingData(batches(), list, 1, 1.0)
  read = functools.partial(inference_adapters.load_base, opened)
  with jax.set_mesh(make_mesh(shape)):
    return loop.fit(opened, workdir, data, Reporter(), lambda _: None, read)


def train_step(config, state, batch, frozen):
  """One that takes no time, and tells one batch and one order from others."""
  del frozen
  by = jnp.mean(batch['tokens'].astype(jnp.float32)) / 100
  params = jax.tree.map(lambda x: 0.9 * x + by, state.params)
  told = dict(loss=by, grad_norm=by)
  return dataclasses.replace(state, step=state.step + 1, params=params), told


@contextlib.contextmanager
def quick():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      evaluation, 'validate', lambda *_, **__: evaluation.Validation(1, 1, {})
    )
    patch.setattr(loop, 'train_step', train_step)
    yield


@pytest.fixture(autouse=True)
def is_quick(request, monkeypatch):
  if 'slow' not in request.keywords:
    monkeypatch.setattr(loop, 'train_step', train_step)
  monkeypatch.setattr(
    evaluation, 'validate', lambda *_, **__: evaluation.Validation(1, 1, {})
  )


@pytest.fixture(scope='module')
def whole(base, tmp_path_factory):
  """The workdir of a run that nothing stopped, and what it ended with."""
  folder = tmp_path_factory.mktemp('whole')
  with quick():
    return folder, fit(of(base), folder)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_its_checkpoints_hold_the_adapter_alone(base, whole):
  folder, outcome = whole
  step, adapter = checkpoint.load_params(folder)
  assert step == 4
  paths = {'/'.join(p) for p in trees.leaves(adapter)}
  matrices = [f'block_00/attention/{name}' for name in ('query', 'value')]
  assert paths == {f'{m}/{x}' for m in matrices for x in 'ab'}
  record = checkpoint.read_record(folder)
  fingerprint = stored.params_fingerprint(base, 3)
  assert record['start']['fingerprint'] == fingerprint
  # The file has the same, and its base's fingerprint.
  tensors, meta = adapter_files.read(folder / 'adapters' / 'new_words')
  found = {'/'.join(p): x for p, x in trees.leaves(adapter).items()}
  assert tensors.keys() == found.keys()
  equal(tensors, found)
  assert (meta['base'], meta['steps']) == (fingerprint, 4)
  # Read back, it is what the run ended with; nothing of the base has changed.
  _, params = weights.load(folder, MODEL)
  equal(params, outcome.params)
  equal(weights.load(base, MODEL)[1], draw_params(MODEL, 0.3))
  for path, x in trees.leaves(params).items():
    was = trees.at(draw_params(MODEL, 0.3), path)
    is_adapted = '/'.join(path) in matrices
    assert np.array_equal(x, was) != is_adapted


def test_killed_and_started_again_it_is_the_same(base, whole, tmp_path, capsys):
  with pytest.raises(KeyboardInterrupt):
    fit(of(base), tmp_path, Killed)
  _, meta = adapter_files.read(tmp_path / 'adapters' / 'new_words')
  assert meta['steps'] == 2
  capsys.readouterr()
  fit(of(base), tmp_path)
  said = capsys.readouterr().out
  assert 'Going on from the checkpoint of step 2' in said
  assert '64 parameters are trained, in adapters of 2 matrices: ' in said
  equal(
    checkpoint.load_params(tmp_path)[1], checkpoint.load_params(whole[0])[1]
  )


@pytest.mark.parametrize('harm', ['removed', 'damaged', 'of another step'])
def test_its_file_is_written_again_by_the_next_start(whole, base, harm):
  folder = whole[0] / 'adapters' / 'new_words'
  tensors, meta = adapter_files.read(folder)
  if harm == 'removed':
    shutil.rmtree(folder)
  elif harm == 'damaged':
    (folder / 'adapter.safetensors').write_bytes(b'cut off')
  else:
    # As a kill between the last checkpoint and the file leaves it.
    adapter_files.write(folder, tensors, meta | dict(steps=2))
  fit(of(base), whole[0])
  again, now = adapter_files.read(folder)
  equal(again, tensors)
  assert now == meta


def test_what_was_refused_may_be_put_right(base, tmp_path):
  with pytest.raises(UserError, match=r'adapter\.targets must find a matrix'):
    fit(of(base, targets='nothing'), tmp_path)
  fit(of(base, targets='attention/query$'), tmp_path)
  with pytest.raises(UserError, match=r'adapter\.targets: .*another --workdir'):
    fit(of(base, targets='attention/key$'), tmp_path)


@pytest.mark.slow
def test_on_another_mesh_it_goes_on(base, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  fit(of(base), one)
  with pytest.raises(KeyboardInterrupt):
    fit(of(base), two, Killed, (2, 1, 2))
  fit(of(base), two)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    checkpoint.load_params(two)[1],
    checkpoint.load_params(one)[1],
  )


@pytest.mark.slow
def test_beside_a_quantized_base(base, tmp_path):
  config = of(base, quantize='weights=nf4')
  outcome = fit(config, tmp_path)
  matrix = outcome.params['block_00']['attention']['query']
  assert matrix.base.kind == 'nf4'
  _, params = weights.load(tmp_path, MODEL)
  equal(params, outcome.params)


@pytest.mark.slow
def test_an_adapter_may_have_a_run_of_another_as_its_base(whole, tmp_path):
  outcome = fit(of(whole[0]), tmp_path)
  _, params = weights.load(tmp_path, MODEL)
  equal(params, outcome.params)
  _, before = weights.load(whole[0], MODEL)
  query = ('block_00', 'attention', 'query')
  assert not np.array_equal(trees.at(params, query), trees.at(before, query))


def test_a_base_that_is_gone_is_named(base, tmp_path):
  (tmp_path / 'gone').mkdir()
  gone = save_untrained(tmp_path / 'gone', MODEL, 0.3)
  with pytest.raises(KeyboardInterrupt):
    fit(of(gone), tmp_path / 'run', Killed)
  gone.rename(tmp_path / 'moved')
  with pytest.raises(UserError, match='must name a workdir with checkpoints'):
    fit(of(gone), tmp_path / 'run')
  # It may be named where it is now.
  fit(of(tmp_path / 'moved'), tmp_path / 'run')
  assert weights.load(tmp_path / 'run', MODEL)[0] == 4


def test_what_the_base_lacks_is_refused(base, tmp_path):
  memory = c.MemoryConfig(
    num_keys=8, key_dim=4, num_selected=4, value_dim=8, placements=((0, 0),)
  )
  model = dataclasses.replace(MODEL, memory=memory)
  with pytest.raises(UserError, match='the model must be that of tra'):
    fit(of(base, model), tmp_path)


def test_another_rank_is_another_run(base, whole):
  with pytest.raises(UserError, match=r'adapter\.rank: 2 -> 3'):
    fit(of(base, rank=3), whole[0])
