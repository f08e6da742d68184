# SPDX-License-Identifier: Apache-2.0
"""The loop in one process: which steps it validates, saves and keeps."""

import dataclasses
import functools

import jax
import pytest
from small_model import CONFIG, Batches

from jaxsparse import config, mesh
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, metrics
from jaxsparse.run.progress import Reporter
from jaxsparse.training import evaluation, loop

SMALL = dataclasses.replace(
  CONFIG,
  model=config.ModelConfig(
    num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
    mlp_dim=8, vocab_size=50,
  ),
  data=dataclasses.replace(CONFIG.data, batch_size=2),
  optimizer=config.OptimizerConfig(warmup_steps=1),
)  # fmt: skip


class KilledError(Exception):
  """Stands for a kill."""


@pytest.fixture
def fit(tmp_path, monkeypatch):
  """Trains with given losses of the validation passes to come."""

  def start(losses, **fields):
    losses = iter(losses)

    def validate(*_, **__):
      loss = next(losses)
      if loss is KilledError:
        raise loss
      return evaluation.Validation(loss, 1.0, {})

    monkeypatch.setattr(evaluation, 'validate', validate)
    whole = dataclasses.replace(SMALL, train=config.TrainConfig(**fields))
    data = loop.TrainingData(Batches(), list, 1, 1.0)
    one = mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(one):
      loop.fit(whole, tmp_path, data, Reporter(is_silent=True), lambda _: None)
    assert next(losses, None) is None

  return start


def test_the_best_is_kept_through_kills(fit, tmp_path):
  start = functools.partial(
    fit, num_steps=9, eval_every=2, save_every=3, keep_checkpoints=1
  )
  with pytest.raises(KilledError):
    # Steps 2 and 4, and 6 right after it was saved.
    start([3.0, 2.0, KilledError], keep_best=1)
  assert checkpoint.stored.steps_in(tmp_path) == [4, 6]
  # The pass of step 6 is made up for; that of 9 is the last.
  start([2.5, 2.75, 2.25], keep_best=1)
  assert checkpoint.stored.steps_in(tmp_path) == [4, 9]
  losses = metrics.validation_losses(tmp_path)
  assert losses == {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.75, 9: 2.25}
  assert checkpoint.best_step(tmp_path, losses) == 4
  # The last one may be the best, and is not kept twice.
  start([2.25, 1.0], keep_best=1, num_steps=11)
  assert checkpoint.stored.steps_in(tmp_path) == [11]


def test_keep_best_needs_passes():
  with pytest.raises(UserError, match='eval_every must be positive with keep_'):
    config.TrainConfig(keep_best=1)


def test_without_keep_best_nothing_more_is_saved(fit, tmp_path):
  fit([3.0, 2.0, 1.0, 4.0], num_steps=4, eval_every=1, save_every=9)
  assert checkpoint.stored.steps_in(tmp_path) == [4]
