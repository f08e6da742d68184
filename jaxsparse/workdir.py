"""The workdir: where training, inference and analysis meet."""

import json

from etils import epath

from jaxsparse import config as config_lib
from jaxsparse.errors import UserError

CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics.jsonl'
SAMPLES = 'samples.jsonl'
PLOTS = 'plots'
TENSORBOARD = 'tensorboard'


def read_config(workdir: epath.PathLike) -> config_lib.Config:
  """The config with which the workdir was trained.

  Raises:
    UserError: the workdir or its config is missing or does not fit.
  """
  path = epath.Path(workdir) / CONFIG
  if not path.exists():
    raise UserError(
      f'workdir {str(workdir)!r} holds no {CONFIG}: give the --workdir of a '
      'training run.'
    )
  return config_lib.from_json(path.read_text())


def append_sample(workdir: epath.PathLike, sample: dict) -> None:
  """Adds one line to the samples of the workdir."""
  with (epath.Path(workdir) / SAMPLES).open('a') as file:
    file.write(json.dumps(sample, ensure_ascii=False) + '\n')
