# SPDX-License-Identifier: Apache-2.0
"""A trained model, for commands and for programs of others."""

import argparse
from typing import Any, Literal

from etils import epath

from jaxsparse.config import Config
from jaxsparse.config.errors import shown
from jaxsparse.run import checkpoint, metrics, run_config


def load(
  workdir: epath.PathLike, step: int | None = None
) -> tuple[Config, dict[str, Any]]:
  """The config and the parameters of a training run; nothing is written.

  `Transformer(config.model).apply({'params': params}, ...)` is the model, and
  `jaxsparse.data.tokenizer.load_from_workdir(workdir)` makes its tokens. What
  is read is compared with the fingerprints taken when it was saved. Needs the
  extra `train`.

  Args:
    workdir: folder of the run, local or such as gs://...
    step: which checkpoint; None takes the newest that is whole.

  Returns:
    The config, with the vocabulary's size set, and the parameters, whole on the
    default device.

  Raises:
    UserError: there is no such run or checkpoint, it can't be read, or it
      belongs to another tokenizer or model.
  """
  config = run_config.read(workdir)
  _, params = checkpoint.load_params(workdir, step)
  return config, params


def to_step(text: str) -> int | Literal['best']:
  """What `--step` says: a checkpoint, or 'best'; a type of argparse."""
  if text != 'best' and not text.isdecimal():
    raise argparse.ArgumentTypeError(
      f"must be a step or 'best', got {shown(text)}"
    )
  return 'best' if text == 'best' else int(text)


def step_of(
  workdir: epath.PathLike, step: int | Literal['best'] | None
) -> int | None:
  """The checkpoint that `to_step` names; None stays, for the newest.

  Raises:
    UserError: it is 'best', and no checkpoint has a validation loss.
  """
  if step != 'best':
    return step
  return checkpoint.best_step(workdir, metrics.validation_losses(workdir))
