# SPDX-License-Identifier: Apache-2.0
"""A run begins with the parameters of another, which draws none of them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.small_run import draw_params, save_untrained
from quick_fit import quick_fit
from small_model import Batches, make_mesh

from jaxsparse import config as c
from jaxsparse.config import saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import bytes_as_json
from jaxsparse.run import (
  checkpoint,
  command_line,
  new_workdir,
  run_config,
  start,
  stored,
)
from jaxsparse.training import resume, start_from

MODEL = c.ModelConfig(
  num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=8, vocab_size=257,
)  # fmt: skip
MEMORY = c.MemoryConfig(
  num_keys=8, key_dim=4, num_selected=4, value_dim=8, placements=((0, 0),),
  replaces_mlp=False,
)  # fmt: skip


@pytest.fixture
def old(tmp_path):
  """A workdir with a checkpoint of step 3."""
  (tmp_path / 'old').mkdir()
  return save_untrained(tmp_path / 'old', MODEL, 0.3)


def of(folder, model=MODEL, **fields):
  """A config that begins there."""
  return c.Config(
    model=model,
    data=c.DataConfig(batch_size=2, seq_len=16),
    optimizer=c.OptimizerConfig(warmup_steps=1, **fields),
    train=c.TrainConfig(
      num_steps=4, save_every=2, log_every=1, start_from=str(folder)
    ),
  )


def begin(config, workdir, say=lambda _: None):
  """As the command opens a workdir."""
  config, _ = resume.open_workdir(config, workdir)
  config = start_from.begin(config, workdir, say)
  resume.save_config(config, workdir)
  return config


@pytest.fixture
def fit(monkeypatch):
  return quick_fit(monkeypatch)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


class Killed(Batches):
  """As if the process ended while it waits for a batch."""

  def __next__(self):
    if self.step == 1:
      raise KeyboardInterrupt
    return super().__next__()


def test_a_run_killed_before_its_first_checkpoint_begins_there_again(
  old, tmp_path, fit, capsys
):
  """Though there is a newer one by then, and no other checkpoint of its own."""
  new, whole = tmp_path / 'new', tmp_path / 'whole'
  fit(begin(of(f'{old}@3'), whole), whole)
  config = begin(of(old), new)
  with pytest.raises(KeyboardInterrupt):
    fit(config, new, Killed)
  checkpoints = checkpoint.Checkpoints(old, keep=2)
  later = draw_params(MODEL, 0.1)
  checkpoints.save(9, later, {'step': jnp.int32(9)}, {})
  checkpoints.close()
  fit(begin(of(old), new), new)
  equal(checkpoint.load_params(new)[1], checkpoint.load_params(whole)[1])
  record = checkpoint.read_record(new)
  assert record['start'] == json.loads((new / 'start.json').read_text())
  assert record['start']['step'] == 3
  # Killed later, it needs the other no more.
  shutil.rmtree(new / 'checkpoints' / '4')
  shutil.rmtree(old)
  fit(begin(of(old), new), new)
  equal(checkpoint.load_params(new)[1], checkpoint.load_params(whole)[1])


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_nothing_is_drawn(old, tmp_path, shape):
  """Of init only shapes are asked."""
  config = begin(of(old), tmp_path / 'new')
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, fun_name='', **__: (
      event.endswith('backend_compile_duration') and compiled.append(fun_name)
    )
  )
  with jax.set_mesh(make_mesh(shape)):
    found = start.settled(config, tmp_path / 'new')
    params = start_from.load_params(config, found, print)
  equal(params, draw_params(MODEL, 0.3))
  assert not [name for name in compiled if 'init' in name or 'added' in name]


def test_parts_that_it_lacks_begin_silent(old, tmp_path):
  new = dataclasses.replace(MODEL, memory=MEMORY, dropout_rate=0.1)
  said = []
  config = begin(of(old, new), tmp_path / 'new', said.append)
  assert 'dropout_rate: 0.0 -> 0.1' in said[-1]
  assert 'model.memory is new' in said[-1]
  with jax.set_mesh(make_mesh((1, 1, 1))):
    found = start.settled(config, tmp_path / 'new')
    params = start_from.load_params(config, found, print)
  memory = params['block_00'].pop('memory')
  equal(params, draw_params(MODEL, 0.3))
  assert not np.any(memory['output'])
  assert np.any(memory['value_table'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(mlp_dim=16), r'mlp/down is \[8, 8\] in .* and \[16, 8\] here'),
    (dict(mlp='gelu'), 'have a place here, but block_00/mlp/gate of'),
    (
      dict(memory=dataclasses.replace(MEMORY, replaces_mlp=True)),
      'throw trained MLPs away',
    ),
  ],
)
def test_another_model_is_refused(old, tmp_path, changes, message):
  model = dataclasses.replace(MODEL, **changes)
  with pytest.raises(UserError, match=message):
    begin(of(old, model), tmp_path / 'new')
  assert not (tmp_path / 'new' / 'start.json').exists()


def test_what_is_not_there_is_said_in_a_sentence(old, tmp_path, fit):
  new = tmp_path / 'new'
  for name, message in (
    (tmp_path / 'none', 'must name a workdir with checkpoints'),
    (f'{old}@5', 'has those of steps 3; got @5'),
    (f'{old}@best', 'has a validation loss'),
  ):
    with pytest.raises(UserError, match=message):
      begin(of(name), new)
  # A checkpoint that has become another.
  config = begin(of(old), new)
  shutil.rmtree(old / 'checkpoints')
  save_untrained(old, MODEL, 0.2)
  with pytest.raises(UserError, match='no longer what this run began with'):
    fit(config, new)


def test_the_best_is_a_step(old, tmp_path):
  line = json.dumps({'step': 3, 'validation_loss': 1.0})
  (old / 'metrics.jsonl').write_text(line + '\n')
  assert start.source(of(f'{old}@best')).step == 3


def test_a_start_stays_and_may_move(old, tmp_path):
  new = tmp_path / 'new'
  config = begin(of(old), new)
  for other in (f'{old}@3', tmp_path / 'moved'):
    if other != f'{old}@3':
      shutil.move(old, other)
    config = begin(of(other), new)
    assert run_config.read(new).train.start_from == str(other)
  assert start.settled(config, new).workdir == str(tmp_path / 'moved')
  different = tmp_path / 'different'
  different.mkdir()
  save_untrained(different, MODEL, 0.1)
  for name in (different, ''):
    with pytest.raises(UserError, match=r'train\.start_from'):
      begin(of(name), new)


def test_the_tokenizer_comes_along(old, tmp_path):
  (old / 'tokenizer_config.json').write_text('{"bos_token": "a"}')
  begin(of(old), tmp_path / 'new')
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / 'new' / name).read_text() == (old / name).read_text()
  other = tmp_path / 'other.json'
  text = (old / 'tokenizer.json').read_text()
  bytes_as_json().save(tmp_path)
  (tmp_path / 'tokenizer.json').rename(other)
  named = of(old)
  named.data.tokenizer = str(other)
  assert other.read_text() != text
  with pytest.raises(UserError, match='is not the one that'):
    begin(named, tmp_path / 'named')
  (old / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match='has no tokenizer: put its'):
    begin(of(old), tmp_path / 'none')


def test_given_parameters_are_not_replaced(old, tmp_path):
  """An import is no new run."""
  new = tmp_path / 'new'
  new.mkdir()
  new_workdir.write(new, of(old), draw_params(MODEL), {})
  assert run_config.read(new).train.start_from == ''
  with pytest.raises(UserError, match=r'train\.start_from'):
    begin(of(old), new)


def test_the_recipe_is_that_of_the_other_run(old, tmp_path):
  flags = [
    f'--workdir={tmp_path}/new',
    f'--config.train.start_from={old}@3',
    '--config.data.batch_size=3',
  ]
  read, _ = command_line.parse_recipe('', flags)
  assert read.model == MODEL
  assert (read.data.batch_size, read.data.seq_len) == (3, 16)
  assert read.train.start_from == f'{old}@3'


def test_the_adapter_of_the_other_run_is_told_or_left_out(old, tmp_path):
  """Another beside it, or all parameters: its own settings go with its kind."""
  lora = c.AdapterConfig(kind='lora', rank=4, targets='query$')
  config = dataclasses.replace(of(old), adapter=lora)
  (old / 'config.json').write_text(saved_config.to_json(config))

  def parsed(*argv):
    flags = [f'--config.train.start_from={old}', f'--workdir={tmp_path}/x']
    return command_line.parse_recipe('', [*argv, *flags])[0]

  assert parsed().adapter == lora
  assert parsed('--config.adapter.rank=8').adapter.targets == 'query$'
  assert parsed('--config.adapter.kind=').adapter == c.AdapterConfig()
  rows = parsed('--config.adapter.kind=rows').adapter
  assert rows == c.AdapterConfig(kind='rows')
  said = []
  begin(parsed(), tmp_path / 'one', said.append)
  assert 'its adapter merged into its base' in said[-2]
  assert 'a new adapter is trained beside both' in said[-1]
  begin(parsed('--config.adapter.kind='), tmp_path / 'all', said.append)
  assert 'its adapter merged into its base' in said[-1]


@pytest.mark.parametrize('is_stored', [True, False])
def test_no_training_begins_beside_a_base_in_fewer_bits(
  old, tmp_path, is_stored
):
  """Whether the base is stored so, or was made so for the adapter."""
  base = old
  if is_stored:
    base = tmp_path / 'quantized'
    base.mkdir()
    record = {stored.QUANTIZED: {'x': {}}}
    checkpoint.save_params(base, {'x': np.zeros(2)}, record)
  config = dataclasses.replace(of(base), adapter=c.AdapterConfig(kind='lora'))
  if not is_stored:
    config.adapter.quantize = 'weights=nf4'
  begun_from = dataclasses.asdict(start.source(config))
  record = dict(config=saved_config.to_json(config), start=begun_from)
  run = tmp_path / 'run'
  run.mkdir()
  checkpoint.save_params(run, {'a': np.zeros(2)}, record)
  (run / 'config.json').write_text(saved_config.to_json(config))
  for kind in ('', 'lora'):
    new = dataclasses.replace(of(run), adapter=c.AdapterConfig(kind=kind))
    with pytest.raises(UserError, match='beside a base in fewer bits'):
      begin(new, tmp_path / f'new{kind}')
