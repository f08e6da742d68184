# SPDX-License-Identifier: Apache-2.0
"""What a text sees a picture by, and the checkpoint of a model that does."""

import dataclasses
from collections.abc import Callable

from etils import epath

from jaxsparse.config import Config, ModelConfig, MultiModalConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.slot_model import SlotModel
from jaxsparse.inference.weights import cast
from jaxsparse.run import checkpoint


@dataclasses.dataclass(frozen=True)
class Sight:
  """Pictures of a model.

  Attributes:
    settings: of the pictures.
    params: see `SlotModel.see`.
  """

  settings: MultiModalConfig
  params: dict


def require_captions(config: Config) -> MultiModalConfig:
  """The settings of a run that has learned captions of single pictures.

  Raises:
    UserError: it has not.
  """
  settings = config.multimodal
  if settings is None or not settings.caption_weight:
    raise UserError(
      'multimodal.caption_weight must be above 0 for captions, which this run '
      f'has not learned; got {settings.caption_weight if settings else 0}: use '
      'jaxsparse retrieve.'
    )
  if settings.num_frames > 1:
    raise UserError(
      f'multimodal.num_frames must be 1 to describe a picture, and this run '
      f'reads {settings.num_frames} frames at once: give a model of pictures.'
    )
  return settings


def load(
  workdir: epath.PathLike,
  settings: MultiModalConfig,
  model: ModelConfig,
  step: int | None = None,
  say: Callable[[str], None] | None = None,
) -> tuple[int, dict, Sight]:
  """The parameters of a checkpoint, as `weights.load` has a language model's.

  Args:
    workdir: of a training run.
    settings: of its pictures, see `require_captions`.
    model: of its text, with vocab_size set.
    step: which checkpoint; None takes the newest that is whole.
    say: gets a sentence about each checkpoint that could not be read.

  Returns:
    The step, parameters of what writes, and its sight.

  Raises:
    UserError: there is no such checkpoint, or it can't be read.
  """
  step, params = checkpoint.load_params(workdir, step, say)
  return step, *split(settings, model, params)


def split(
  settings: MultiModalConfig, model: ModelConfig, params: dict
) -> tuple[dict, Sight]:
  """Parameters of what writes and its sight, of an encoder's, which are gone.

  Those of the text are folded and cast, see `fold` and `weights`.
  """
  text = params.pop('text')
  if SlotModel(model, settings).stands_beside:
    # Between its last norm and the vocabulary are other layers: nothing folds.
    return params | dict(text=cast(model, text)), Sight(settings, {})
  text = cast(model, fold_for_decode(model, text))
  return text, Sight(settings, params)
