# SPDX-License-Identifier: Apache-2.0
"""Runs with tables on file, as a user starts them: kills, damage, a sample."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest
from test_train import (  # noqa: F401
  finish,
  losses,
  recipe,
  rows,
  start,
  wait_for_step,
)

FLAGS = (
  '--config.model.memory.table.store=file',
  '--config.optimizer.value_optimizer=row_adam',
  # Steps are left for later when it validates.
  '--config.train.eval_every=8',
)


@pytest.mark.slow
def test_killed_at_random_moments_it_is_the_run_that_nobody_killed(
  recipe,  # noqa: F811
  tmp_path,
):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  resident = tmp_path / 'resident'
  finish(start(recipe, whole, *FLAGS))
  rng = random.Random(1)
  for _ in range(3):
    process = start(recipe, killed, *FLAGS)
    target = max(losses(killed), default=0) + rng.randint(1, 9)
    wait_for_step(process, killed, min(target, 35))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  finish(start(recipe, killed, *FLAGS))
  finish(start(recipe, resident, *FLAGS[1:]))
  assert losses(killed) == losses(whole) == losses(resident)
  assert rows(killed)[-1] == rows(whole)[-1] == rows(resident)[-1]
  for path in (whole / 'tables').rglob('*.rows'):
    same = killed / 'tables' / path.relative_to(whole / 'tables')
    assert path.read_bytes() == same.read_bytes()
  # The newest checkpoint is damaged: the tables are those of the one before.
  newest = max((killed / 'checkpoints').iterdir(), key=lambda p: int(p.name))
  shutil.rmtree(newest / 'params' / 'd')
  out, _ = finish(start(recipe, killed, *FLAGS))
  assert 'The checkpoint of step 40 is damaged' in out
  assert 'Going on from the checkpoint of step 35.' in out
  assert rows(killed)[-1] == rows(whole)[-1]


LARGE = (
  '--config.model.memory.num_keys=3163',
  '--config.model.memory.expansion=1',
  '--config.model.memory.value_dim=64',
  '--config.model.memory.table.dtype=float32',
  '--config.model.memory.table.store=file',
  '--config.model.memory.table.init=zeros',
  '--config.optimizer.value_optimizer=row_adagrad',
)


def peak_memory(command, folder):
  """Runs a command and returns the most memory that it held, in bytes."""
  with (folder / 'out').open('w') as out:
    process = subprocess.Popen(
      [sys.executable, *command],
      cwd=pathlib.Path(__file__).parents[2],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=out,
      stderr=out,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  assert process.returncode == 0, (folder / 'out').read_text()
  return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_a_table_of_ten_million_rows_takes_no_memory(
  recipe,  # noqa: F811
  tmp_path,
):
  """2.4 GiB: trained on, killed, resumed, sampled."""
  workdir = tmp_path / 'run'
  process = start(recipe, workdir, *LARGE)
  wait_for_step(process, workdir, 12)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  train = ['train.py', f'--config={recipe}', f'--workdir={workdir}', *LARGE]
  sample = ['-m', 'jaxsparse', 'generate', f'--workdir={workdir}']
  quantized = [*sample, '--max_tokens=8', '--quantize=tables=int8']
  for command in (train, [*sample, '--max_tokens=8'], quantized):
    assert peak_memory(command, tmp_path) < 1.5 * 2**30
  assert 'Going on from the checkpoint' not in (tmp_path / 'out').read_text()
  assert max(losses(workdir)) == 40
  table = workdir / 'tables/block_00/memory/value_table.rows'
  assert table.stat().st_size > 2.3 * 2**30
  assert table.stat().st_blocks * 512 < 2**28
  (table,) = (workdir / 'mapped_tables').rglob('*.rows')
  assert table.parts[-4].endswith('_int8')
  assert table.stat().st_blocks * 512 < 2**28
