# SPDX-License-Identifier: Apache-2.0
"""The configuration of how pairs are changed from epoch to epoch."""

import dataclasses

from jaxsparse.config import fields
from jaxsparse.config.errors import require, require_fraction


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AugmentConfig:
  """What may happen to a pair that is learned; 0 leaves it out."""

  # Largest shift along each side, as a share of it; white comes in.
  shift: float = 0.0
  # Largest share of the side that is cut off before what is left fills the
  # square again.
  crop: float = 0.0
  # Whether left and right are changed over in half of the pictures. Captions
  # that tell them apart, and letters, are then wrong.
  flip: bool = False
  # Largest change of brightness, up or down, as a share of white.
  brightness: float = 0.0
  # Standard deviation of noise on each value, as a share of white.
  noise: float = 0.0
  # Share of a caption's words that are read as unknown ones, of
  # data.tokenizer = 'words': so words that no caption had mean something.
  unknown: float = 0.0

  def __post_init__(self):
    fields.check(self)
    require_fraction(self, 'shift', 'crop', 'brightness', 'noise')
    require_fraction(self, 'unknown')
    require(self.crop < 1, f'crop must be below 1, got {self.crop}.')
