# SPDX-License-Identifier: Apache-2.0
"""A text that reads two frames of sixteen answers as one that reads all."""

import json

import pytest

from jaxsparse.cli import train

pytestmark = pytest.mark.slow

CHANCE = 1 / 8


@pytest.fixture(scope='module')
def validated(tmp_path_factory):
  """Runs a recipe, and gives what its last line says of held-out videos."""
  folder = tmp_path_factory.mktemp('frames')

  def run(recipe, *flags):
    workdir = folder / '_'.join((recipe, *flags)).replace('.', '_')
    train.main(
      [
        f'--config=multimodal:{recipe}',
        f'--workdir={workdir}',
        f'--config.data.cache_dir={folder / "cache"}',
        '--config.train.num_steps=1000',
        '--config.train.save_every=1000',
        *flags,
      ]
    )
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])

  return run


def test_two_of_sixteen_frames_answer_nearly_as_often_as_all(validated):
  full, routed = validated('frames'), validated('frames_routed')
  assert full['validation_share_read'] == 1
  assert routed['validation_share_read'] == 2 / 16
  assert full['validation_chosen'] > 0.85
  assert routed['validation_chosen'] > 0.9 * full['validation_chosen']


def test_without_the_text_two_frames_answer_seldom(validated):
  flag = '--config.multimodal.frame_choice=uniform'
  found = validated('frames_routed', flag)
  assert found['validation_share_read'] == 2 / 16
  # Who knows when the frame was read is right then, and guesses else.
  right = 2 / 16 + (1 - 2 / 16) * CHANCE
  assert CHANCE - 0.05 < found['validation_chosen'] < right + 0.05
