# SPDX-License-Identifier: Apache-2.0
"""A workdir that a command fills: empty again when that fails or is killed."""

import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from jaxsparse import config as c
from jaxsparse.config.errors import UserError
from jaxsparse.run import new_workdir, run_config, workdir_lock

KILLED = f"""
import os, pathlib, sys
from jaxsparse.run import new_workdir
new_workdir.require_new(sys.argv[1])
with new_workdir.emptied_on_failure(sys.argv[1]):
  pathlib.Path(sys.argv[1], 'tokenizer.json').write_text('a part')
  os.kill(os.getpid(), {signal.SIGKILL:d})
"""


def names(folder):
  return {path.name for path in folder.iterdir()} - {workdir_lock.LOCK}


def test_after_a_kill_one_can_try_again(tmp_path):
  folder = tmp_path / 'new'
  ended = subprocess.run(
    [sys.executable, '-c', KILLED, str(folder)], env=os.environ
  )
  assert ended.returncode == -signal.SIGKILL
  assert 'tokenizer.json' in names(folder)
  new_workdir.require_new(folder)
  with new_workdir.emptied_on_failure(folder):
    assert 'tokenizer.json' not in names(folder)
    # Nobody else begins there meanwhile.
    with pytest.raises(UserError, match='is in use by process'):
      new_workdir.require_new(folder)
    (folder / 'config.json').write_text('{}')
  assert names(folder) == {'config.json'}
  with pytest.raises(UserError, match='must be new or an empty folder'):
    new_workdir.require_new(folder)


def test_what_is_whole_or_of_others_is_kept(tmp_path):
  (tmp_path / 'unfinished').touch()
  (tmp_path / 'config.json').touch()
  with pytest.raises(UserError, match='must be new or an empty folder'):
    new_workdir.require_new(tmp_path)
  assert names(tmp_path) == {'unfinished', 'config.json'}


def test_of_an_adapters_run_it_has_parameters_alone(tmp_path):
  config = c.Config(
    train=c.TrainConfig(start_from='base'),
    adapter=c.AdapterConfig(kind='lora', rank=4),
  )
  new_workdir.write(tmp_path, config, dict(x=jnp.ones(2)), dict(made='here'))
  written = run_config.read(tmp_path)
  assert (written.train.start_from, written.adapter.kind) == ('', '')
