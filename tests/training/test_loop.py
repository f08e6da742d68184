# SPDX-License-Identifier: Apache-2.0
"""The loop by itself: what it reports, when it stops, what it owes after."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, make_mesh

from jaxsparse.config import OptimizerConfig, TrainConfig
from jaxsparse.config.errors import UserError
from jaxsparse.run.progress import Reporter
from jaxsparse.training import evaluation, first_state, loop, loss_scale
from jaxsparse.training.step import TrainState

MODEL = dataclasses.replace(CONFIG.model, memory=None)


def init_parts(config):
  step = jnp.zeros((), jnp.int32)
  scale = loss_scale.first(config.model.dtype)
  state = TrainState(step, {'w': jnp.zeros(2)}, {'m': jnp.ones(3)}, scale)
  return state, {}


def train_step(config, state, batch, frozen, overflows=()):
  """One that takes no time, whose loss names the batch."""
  number = jnp.mean(batch['tokens'])
  w, scale = state.params['w'] + number, state.loss_scale
  is_finite = ~jnp.any(number == jnp.asarray([*overflows, -1]))
  norm = jnp.where(is_finite, jnp.sum(w), jnp.inf)
  metrics = {'loss': number, 'grad_norm': norm}
  if scale is not None:
    metrics['loss_scale'] = scale.scale
    scale = loss_scale.after(scale, is_finite)
    metrics['overflows'] = scale.num_overflows
  return TrainState(state.step + 1, {'w': w}, state.opt_state, scale), metrics


class Batches:
  """Batches whose tokens are their own number."""

  def __init__(self, on_batch=lambda number: None):
    self.number, self._on_batch = 0, on_batch

  def __next__(self):
    self.number += 1
    self._on_batch(self.number)
    return {'tokens': np.full((2, 4), self.number, np.float32)}

  def get_state(self):
    return {'lanes': {'0': self.number}}

  def set_state(self, state):
    self.number = state['lanes']['0']

  def close(self):
    pass


@pytest.fixture
def fit(monkeypatch, tmp_path):
  monkeypatch.setattr(first_state, 'init_parts', init_parts)
  monkeypatch.setattr(
    evaluation,
    '_evaluate',
    lambda config, params, batch: dict(
      nats=params['w'][0], targets=1.0, slot_counts={}
    ),
  )

  def run(
    on_batch=lambda number: None,
    on_validation=lambda: None,
    dtype='float32',
    overflows=(),
    **train,
  ):
    step = functools.partial(train_step, overflows=overflows)
    monkeypatch.setattr(loop, 'train_step', step)
    train = TrainConfig(**{'num_steps': 7, 'save_every': 100, **train})
    config = dataclasses.replace(
      CONFIG,
      model=dataclasses.replace(MODEL, dtype=dtype),
      optimizer=OptimizerConfig(),
      train=train,
    )

    def validation():
      for _ in range(3):
        yield {'tokens': np.zeros((2, 4), np.float32)}
      on_validation()

    data = loop.TrainingData(Batches(on_batch), validation, 10, 1.0)
    with jax.set_mesh(make_mesh((1, 1, 1))):
      return loop.fit(config, tmp_path, data, Reporter(), lambda speed: None)

  return run


def rows(tmp_path, name):
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  found = map(json.loads, lines)
  return [(r['step'], r[name]) for r in found if name in r]


def at(number, name):
  """Sends a signal when the batch `number` is asked for."""

  def on_batch(asked):
    if asked == number:
      os.kill(os.getpid(), signal.Signals[name])

  return on_batch


@pytest.mark.parametrize(
  ('settings', 'steps'),
  [
    (dict(log_every=1), [1, 2, 3, 4, 5, 6, 7]),
    (dict(log_every=1, save_every=2), [1, 2, 3, 4, 5, 6, 7]),
    (dict(log_every=3), [1, 3, 6, 7]),
    (dict(log_every=2, save_every=3, eval_every=2), [1, 2, 4, 6, 7]),
  ],
)
def test_each_step_is_reported_once_with_its_own_numbers(
  fit, tmp_path, settings, steps
):
  """Though each is read while the next one runs."""
  fit(**settings)
  assert rows(tmp_path, 'loss') == [(step, step) for step in steps]
  sums = [(step, step * (step + 1)) for step in steps]
  assert rows(tmp_path, 'grad_norm') == sums


def test_compiling_is_said_and_in_no_estimate(fit, tmp_path, capsys):
  fit(log_every=1, num_steps=3, eval_every=2)
  lines = [
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith(('Compiling', 'step'))
  ]
  assert lines[:2] == [
    'Compiling the first parameters ...',
    'Compiling training ...',
  ]
  assert lines[2].startswith('step 1/3 ')
  assert 'tokens/s' not in lines[2]
  assert 'left' not in lines[2]
  assert lines[3].startswith('step 2/3 ')
  assert lines[3].endswith(' left')
  assert lines.count('Compiling validation ...') == 1
  assert [step for step, _ in rows(tmp_path, 'tokens_per_second')] == [2, 3]


@pytest.mark.parametrize('name', TrainConfig().stop_signals)
def test_a_signal_saves_and_the_next_start_goes_on(fit, tmp_path, capsys, name):
  if signal.getsignal(signal.Signals[name]) == signal.SIG_IGN:
    pytest.skip(f'{name} is ignored here, as under nohup, and runs keep to it')
  outcome = fit(at(4, name), log_every=1)
  assert outcome.validation is None
  assert outcome.step == 4
  assert f'{name}: saved step 4 of 7; the same command' in (
    capsys.readouterr().out
  )
  assert fit(log_every=1).validation is not None
  assert rows(tmp_path, 'loss') == [(step, step) for step in range(1, 8)]


def test_a_validation_that_a_signal_stopped_is_made_good(fit, tmp_path):
  def stop():
    os.kill(os.getpid(), signal.SIGTERM)

  settings = dict(log_every=1, save_every=2, eval_every=2)
  assert fit(on_validation=stop, **settings).step == 2
  assert rows(tmp_path, 'validation_loss') == []
  # And if it is stopped again.
  assert fit(on_validation=stop, **settings).step == 2
  fit(**settings)
  found = rows(tmp_path, 'validation_loss')
  assert found == [(2, 3.0), (4, 10.0), (6, 21.0), (7, 28.0)]
  assert rows(tmp_path, 'loss') == [(step, step) for step in range(1, 8)]


def test_a_validation_that_is_done_is_not_repeated(fit, tmp_path):
  settings = dict(log_every=1, save_every=2, eval_every=2)
  assert fit(at(5, 'SIGTERM'), **settings).step == 5
  fit(**settings)
  assert [s for s, _ in rows(tmp_path, 'validation_loss')] == [2, 4, 6, 7]


def test_a_step_that_overflows_is_told_of_and_the_run_goes_on(
  fit, tmp_path, capsys
):
  fit(dtype='float16', overflows=(3, 4), log_every=1)
  halves = [1, 1, 1, 2, 4, 4, 4]
  scales = [(i, loss_scale.FIRST / n) for i, n in enumerate(halves, 1)]
  assert rows(tmp_path, 'loss_scale') == scales
  counts = [count for _, count in rows(tmp_path, 'overflows')]
  assert counts == [0, 0, 1, 2, 2, 2, 2]
  assert rows(tmp_path, 'grad_norm')[2] == (3, None)
  out = capsys.readouterr().out
  assert out.count('is left out: its gradients overflow float16') == 1
  assert 'Step 3 is left out' in out
  assert 'loss scale 8,192  2 overflows' in out


@pytest.mark.parametrize(
  ('dtype', 'first', 'advice'),
  [
    ('float32', 2, 'set optimizer.clip_norm'),
    # 15 halvings on the way to the least scale.
    ('float16', 17, "go on in 'bfloat16' or 'float32'"),
  ],
)
def test_a_run_that_can_not_go_on_ends_in_a_sentence(fit, dtype, first, advice):
  with pytest.raises(UserError, match=f'inf at step {first}: .*{advice}'):
    fit(dtype=dtype, overflows=range(2, 50), num_steps=50)


@pytest.mark.parametrize(
  ('earlier', 'later', 'halves'),
  [
    # The fourth step after the overflow doubles the scale again.
    ('float16', 'float16', [1, 1, 2, 2, 2, 2, 1]),
    ('float16', 'float32', [1, 1, 2, 2]),
    ('float32', 'float16', [None, None, None, None, 1, 1, 1]),
  ],
)
def test_the_loss_scale_survives_a_resume(
  fit, tmp_path, monkeypatch, earlier, later, halves
):
  monkeypatch.setattr(loss_scale, 'PATIENCE', 4)
  overflows = [2] if earlier == 'float16' else []
  fit(at(4, 'SIGTERM'), dtype=earlier, overflows=overflows, log_every=1)
  fit(dtype=later, log_every=1)
  assert [step for step, _ in rows(tmp_path, 'loss')] == [*range(1, 8)]
  assert rows(tmp_path, 'loss_scale') == [
    (i, loss_scale.FIRST / half) for i, half in enumerate(halves, 1) if half
  ]
  if later == 'float16':
    expected = [(7, float(earlier == 'float16'))]
    assert rows(tmp_path, 'overflows')[-1:] == expected
