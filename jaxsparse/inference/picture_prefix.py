# SPDX-License-Identifier: Apache-2.0
"""A picture that stands before a text: all that a language model needs of it.

Its patches are the first rows of a sequence (`fusion_type` = 'prefix'), which
the ordinary cache then holds as it holds tokens: whatever is written behind
them is written as any other text.
"""

import dataclasses
from collections.abc import Callable

from etils import epath

from jaxsparse.config import Config, ModelConfig, MultiModalConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.weights import cast
from jaxsparse.run import checkpoint


@dataclasses.dataclass(frozen=True)
class PicturePrefix:
  """What makes rows of a picture.

  Attributes:
    settings: of the picture.
    params: of its encoder, without the text's.
  """

  settings: MultiModalConfig
  params: dict

  @property
  def num_rows(self) -> int:
    """Rows of a sequence that a picture takes, before those of its tokens."""
    return self.settings.vision.num_patches


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
  config: Config,
  model: ModelConfig,
  step: int | None = None,
  say: Callable[[str], None] | None = None,
) -> tuple[int, dict, PicturePrefix]:
  """The parameters of a checkpoint, as `weights.load` has a language model's.

  Args:
    workdir: of a training run.
    config: of the run, with fusion_type = 'prefix'.
    model: of its text, with vocab_size set.
    step: which checkpoint; None takes the newest that is whole.
    say: gets a sentence about each checkpoint that could not be read.

  Returns:
    The step, the language model's parameters, folded for decoding, and what
    puts a picture before its text.

  Raises:
    UserError: there is no such checkpoint, or it can't be read.
  """
  assert config.multimodal is not None
  step, params = checkpoint.load_params(workdir, step, say)
  text = cast(model, fold_for_decode(model, params.pop('text')))
  return step, text, PicturePrefix(config.multimodal, params)
