# SPDX-License-Identifier: Apache-2.0
"""Pictures and frames beside text."""

from jaxsparse.nn.multimodal.encoder import (
  MultiModalEncoder as MultiModalEncoder,
)
from jaxsparse.nn.multimodal.patch_encoder import PatchEncoder as PatchEncoder
