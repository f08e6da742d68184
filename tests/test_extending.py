# SPDX-License-Identifier: Apache-2.0
"""The guides' own steps add a layer, an attention and an optimizer."""

import os
import pathlib
import subprocess
import sys

import guide_steps
import pytest

# Source files that each may touch, new ones among them.
MOST_FILES = dict(new_layer=3, new_attention=4, new_optimizer=2)


@pytest.fixture(scope='module')
def extended(tmp_path_factory):
  """A copy of the package with all three, and the files that each touched."""
  folder = tmp_path_factory.mktemp('extended')
  guide_steps.copy_package(folder)
  return folder, {name: guide_steps.take(name, folder) for name in MOST_FILES}


def test_few_files_are_touched(extended):
  _, touched = extended
  for guide, most in MOST_FILES.items():
    assert 0 < len(touched[guide]) <= most, guide
    assert all(name.startswith('jaxsparse/') for name in touched[guide])


def test_what_they_add_trains_and_decodes(extended):
  folder, _ = extended
  done = subprocess.run(
    [sys.executable, pathlib.Path(__file__).with_name('extended_package.py')],
    env=os.environ
    | dict(
      PYTHONPATH=str(folder), JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='4'
    ),
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
