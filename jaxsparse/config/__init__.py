# SPDX-License-Identifier: Apache-2.0
"""What a run is: every configuration dataclass, and its checks."""

from jaxsparse.config.adapter import AdapterConfig as AdapterConfig
from jaxsparse.config.attention import DCMHAConfig as DCMHAConfig
from jaxsparse.config.attention import RopeScalingConfig as RopeScalingConfig
from jaxsparse.config.attention import (
  SparseAttentionConfig as SparseAttentionConfig,
)
from jaxsparse.config.augment import AugmentConfig as AugmentConfig
from jaxsparse.config.data import DataConfig as DataConfig
from jaxsparse.config.memory import MemoryConfig as MemoryConfig
from jaxsparse.config.model import ModelConfig as ModelConfig
from jaxsparse.config.model import MoEConfig as MoEConfig
from jaxsparse.config.multimodal import MultiModalConfig as MultiModalConfig
from jaxsparse.config.multimodal import VisionConfig as VisionConfig
from jaxsparse.config.run import Config as Config
from jaxsparse.config.run import MeshConfig as MeshConfig
from jaxsparse.config.run import OptimizerConfig as OptimizerConfig
from jaxsparse.config.run import TrainConfig as TrainConfig
from jaxsparse.config.run import validated as validated
from jaxsparse.config.tables import TableConfig as TableConfig
