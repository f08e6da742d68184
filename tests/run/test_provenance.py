# SPDX-License-Identifier: Apache-2.0
"""Weights are used with their own tokenizer and model only."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxsparse import config as config_lib
from jaxsparse.config import saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, provenance

CONFIG = config_lib.Config(
  model=config_lib.ModelConfig(
    vocab_size=20, memory=config_lib.MemoryConfig(placements=((0, 1),))
  )
)
STATE = {'x': jnp.ones(3)}, {'step': jnp.int32(1)}


def with_memory(**fields):
  memory = dataclasses.replace(CONFIG.model.memory, **fields)
  return dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, memory=memory)
  )


def write_config(workdir, config):
  (workdir / 'config.json').write_text(saved_config.to_json(config))


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('one tokenizer')
  write_config(tmp_path, CONFIG)
  checkpoints = checkpoint.Checkpoints(tmp_path, 1)
  checkpoints.save(1, *STATE, provenance.record(CONFIG, tmp_path))
  checkpoints.close()
  return tmp_path


def load(workdir):
  return checkpoint.load_params(workdir)[0]


def resume(workdir):
  checkpoints = checkpoint.Checkpoints(workdir, 1)
  return checkpoints.restore(*jax.eval_shape(lambda: STATE), print)[0]


@pytest.mark.parametrize('use', [load, resume])
def test_another_tokenizer(workdir, use):
  assert use(workdir) == 1
  tokenizer = workdir / 'tokenizer.json'
  tokenizer.write_text('two tokenizer')
  with pytest.raises(UserError, match=r'^tokenizer.json in .* is not the'):
    use(workdir)
  tokenizer.rename(workdir / 'tokenizer.model')
  with pytest.raises(UserError, match=r'^tokenizer.model in .* is not the'):
    use(workdir)
  (workdir / 'tokenizer.model').unlink()
  with pytest.raises(UserError, match=r'^tokenizer.json in .* is not the'):
    use(workdir)
  tokenizer.write_text('one tokenizer')
  # Of two, the first is in use.
  (workdir / 'tokenizer.model').touch()
  assert use(workdir) == 1


@pytest.mark.parametrize('use', [load, resume])
def test_another_model(workdir, use):
  write_config(workdir, with_memory(num_selected=3))
  with pytest.raises(UserError, match=r'model.memory.num_selected: .* -> 3'):
    use(workdir)
  write_config(
    workdir, with_memory(table=config_lib.TableConfig(scheme='rows'))
  )
  assert use(workdir) == 1
  # Whoever reads a damaged one says so.
  for content in (b'', b'\0' * 9, b'{"model": 3}', b'\xff'):
    (workdir / 'config.json').write_bytes(content)
    assert use(workdir) == 1


def test_older_records_have_neither(tmp_path):
  provenance.check({'data': 1}, tmp_path)
