# SPDX-License-Identifier: Apache-2.0
"""A workdir that jaxsparse 0.1.0 wrote still resumes, generates and reports.

`fixtures/workdir_0_1_0.tar.gz` holds a run of six steps with a text of four
files, killed after the checkpoint of step 3 but with the metrics of all steps.
Its recipe sets a Tucker rank with additive scores, which did nothing then and
is refused in a new recipe. Its value tables have `row_adam`; those of
`workdir_0_1_0_adamw.tar.gz`, of a later day but before the optimizer's state
had one shape, have AdamW.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest
from commands import exit_code

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = pathlib.Path(__file__).parent / 'fixtures'


@pytest.fixture(
  params=[
    'workdir_0_1_0',
    pytest.param('workdir_0_1_0_adamw', marks=pytest.mark.slow),
  ]
)
def folder(request, tmp_path):
  with tarfile.open(FIXTURES / f'{request.param}.tar.gz') as archive:
    archive.extractall(tmp_path, filter='data')
  return tmp_path


def run(folder, *arguments):
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def losses(folder):
  rows = map(json.loads, (folder / 'w/metrics.jsonl').read_text().splitlines())
  return {row['step']: row['loss'] for row in rows if 'loss' in row}


def test_the_run_goes_on_with_its_old_losses(folder):
  before = losses(folder)
  recipe = folder / 'recipe.py'
  recipe.write_text(recipe.read_text().replace(' tucker_rank=7,', ''))
  said = run(
    folder, str(ROOT / 'train.py'), '--config=recipe.py', '--workdir=w'
  )
  assert 'Going on from the checkpoint of step 3.' in said
  after = losses(folder)
  assert after.keys() == before.keys()
  assert after == pytest.approx(before, rel=1e-6)


def test_old_parameters_are_sampled_and_pictures_drawn(
  folder, monkeypatch, capsys
):
  monkeypatch.chdir(folder)
  argv = ['generate', '--workdir=w', '--prompt=sun', '--max_tokens=4']
  assert exit_code(argv) == 0
  assert capsys.readouterr().out.startswith('sun')
  assert exit_code(['report', 'w']) == 0
  assert 'training.png' in capsys.readouterr().out
  assert (folder / 'w/plots/training.png').stat().st_size > 10_000
