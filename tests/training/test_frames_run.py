# SPDX-License-Identifier: Apache-2.0
"""A text that reads two frames of sixteen answers as one that reads all."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CHANCE = 1 / 8


@pytest.fixture(scope='module')
def validated(tmp_path_factory):
  """Starts a recipe, and gives what its last line says of held-out videos."""
  folder = tmp_path_factory.mktemp('frames')

  def start(name, recipe, *flags):
    workdir = folder / name
    # Of one device, and optimized: the suite's programs are slow.
    subprocess.run(
      [
        *(sys.executable, '-m', 'jaxsparse', 'train'),
        f'--config=multimodal:{recipe}',
        f'--workdir={workdir}',
        f'--config.data.cache_dir={folder / "cache"}',
        *flags,
      ],
      env=dict(os.environ, XLA_FLAGS=''),
      check=True,
    )
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])

  return start


def test_two_of_sixteen_frames_answer_nearly_as_often_as_all(validated):
  full = validated('full', 'frames')
  assert full['validation_share_read'] == 1
  assert full['validation_chosen'] > 0.9
  begins = ('--config.multimodal.frames_read=0', '--config.train.num_steps=600')
  assert validated('routed', 'frames_routed', *begins)
  routed = validated('routed', 'frames_routed')
  assert routed['validation_share_read'] == 2 / 16
  assert routed['validation_chosen'] > 0.9 * full['validation_chosen']


def test_without_the_text_two_frames_answer_seldom(validated):
  flag = '--config.multimodal.frame_choice=uniform'
  uniform = validated('uniform', 'frames_routed', flag)
  assert uniform['validation_share_read'] == 2 / 16
  # Who knows when the frame was read is right then, and guesses else.
  right = 2 / 16 + (1 - 2 / 16) * CHANCE
  assert CHANCE - 0.05 < uniform['validation_chosen'] < right + 0.05
