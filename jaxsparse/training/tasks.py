# SPDX-License-Identifier: Apache-2.0
"""What a run learns: the next tokens of text, or pictures with captions.

A task is a module with `draw` and `loss`, which the training step calls.
"""

from types import ModuleType

from jaxsparse.config import Config
from jaxsparse.training import language, pairs


def of(config: Config) -> ModuleType:
  """The task of a run."""
  return pairs if config.multimodal else language
