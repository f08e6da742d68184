# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a trained model is meant."""

import argparse
from typing import Literal

from etils import epath

from jaxsparse.config.errors import shown
from jaxsparse.run import checkpoint, metrics


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
