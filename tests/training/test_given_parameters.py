# SPDX-License-Identifier: Apache-2.0
"""Training begins from a workdir that no training made."""

import dataclasses

import jax
import numpy as np
import pytest
from inference.small_run import draw_params
from small_model import Batches

from jaxsparse import config, mesh
from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.run import checkpoint, command_line, new_workdir, run_config
from jaxsparse.run.progress import Reporter
from jaxsparse.training import evaluation, loop, resume

GIVEN = config.Config(
  model=config.ModelConfig(
    num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
    mlp_dim=8, vocab_size=257,
  ),
)  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / 'given'
  new_workdir.require_new(folder)
  ByteTokenizer().save(folder)
  params = draw_params(GIVEN.model, 0.3)
  new_workdir.write(folder, GIVEN, params, {'from': 'elsewhere'})
  return folder


def fit(workdir, monkeypatch):
  """Four steps."""
  monkeypatch.setattr(
    evaluation, 'validate', lambda *_, **__: evaluation.Validation(1, 1, {})
  )
  whole = dataclasses.replace(
    run_config.read(workdir),
    data=dataclasses.replace(GIVEN.data, batch_size=2, seq_len=32),
    optimizer=config.OptimizerConfig(warmup_steps=1),
    train=config.TrainConfig(
      num_steps=4, save_every=2, keep_checkpoints=1, log_every=1
    ),
  )
  data = loop.TrainingData(Batches(), list, 1, 1.0)
  one = mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  with jax.set_mesh(one):
    loop.fit(whole, workdir, data, Reporter(), lambda _: None)


def test_it_trains_what_is_given_and_keeps_it(workdir, monkeypatch, capsys):
  given = draw_params(GIVEN.model, 0.3)
  fit(workdir, monkeypatch)
  said = capsys.readouterr().out
  assert 'Beginning with the parameters that the workdir has.' in said
  # The newest alone is asked for, but the given one can't be made again.
  step, kept = checkpoint.load_params(workdir, 0)
  assert step == 0
  jax.tree.map(np.testing.assert_array_equal, kept, given)
  step, trained = checkpoint.load_params(workdir)
  assert step == 4
  changes = jax.tree.map(lambda a, b: float(abs(a - b).max()), kept, trained)
  assert 0 < max(jax.tree.leaves(changes)) < 4 * 3e-3 * 1.5


def test_all_but_the_model_is_free_until_it_has_begun(workdir, monkeypatch):
  other = dataclasses.replace(
    GIVEN,
    data=config.DataConfig(seq_len=64, batch_size=2),
    train=config.TrainConfig(seed=3),
    optimizer=config.OptimizerConfig(name='muon'),
  )
  assert resume.open_workdir(other, workdir) == (other, [])
  wider = dataclasses.replace(GIVEN.model, mlp_dim=16)
  with pytest.raises(UserError, match='mlp_dim: 8 -> 16'):
    resume.open_workdir(dataclasses.replace(GIVEN, model=wider), workdir)
  fit(workdir, monkeypatch)
  with pytest.raises(UserError, match='seed: 0 -> 3'):
    resume.open_workdir(other, workdir)


def test_the_workdir_is_the_recipe(workdir):
  flags = [f'--workdir={workdir}', '--config.data.batch_size=3']
  read, folder = command_line.parse_recipe('', flags)
  assert folder == str(workdir)
  assert read.model == GIVEN.model
  assert read.data.batch_size == 3
  with pytest.raises(UserError, match='--config=FILE is missing'):
    command_line.parse_recipe('', [f'--workdir={workdir}/new'])


def test_a_tokenizer_that_comes_later(tmp_path):
  """A model without one may get it; one that has one keeps it."""
  params = draw_params(GIVEN.model)
  new_workdir.write(tmp_path, GIVEN, params, {})
  ByteTokenizer().save(tmp_path)
  assert checkpoint.load_params(tmp_path)[0] == 0


@pytest.mark.parametrize('name', ['bytes', 'bpe'])
def test_no_tokenizer_is_made_for_what_is_given(tmp_path, name):
  data = config.DataConfig(tokenizer=name)
  whole = dataclasses.replace(GIVEN, data=data)
  resume.require_tokenizer(whole, tmp_path)  # Nothing is given yet.
  new_workdir.write(tmp_path, GIVEN, draw_params(GIVEN.model), {})
  with pytest.raises(UserError, match='but no tokenizer: put its'):
    resume.require_tokenizer(whole, tmp_path)
  file = config.DataConfig(tokenizer='tokenizer.json')
  resume.require_tokenizer(dataclasses.replace(GIVEN, data=file), tmp_path)
  ByteTokenizer().save(tmp_path)
  resume.require_tokenizer(whole, tmp_path)


def test_what_is_half_written_is_no_recipe(tmp_path, monkeypatch):
  """Training by a config alone would begin from nothing, and not say so."""

  def fail(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(checkpoint, 'save_params', fail)
  with pytest.raises(KeyboardInterrupt):
    new_workdir.write(tmp_path, GIVEN, draw_params(GIVEN.model), {})
  assert not (tmp_path / 'config.json').exists()


def test_nothing_is_overwritten(workdir):
  with pytest.raises(UserError, match='must be new or an empty folder'):
    new_workdir.require_new(workdir)
  with pytest.raises(UserError, match='must be new or an empty folder'):
    new_workdir.require_new(workdir / 'config.json')
