# SPDX-License-Identifier: Apache-2.0
"""Sparse language models in JAX: what a guest may use.

Each name is imported when it is first asked for, so that one layer brings no
more than it needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxsparse.config import DCMHAConfig as DCMHAConfig
  from jaxsparse.config import MemoryConfig as MemoryConfig
  from jaxsparse.config import ModelConfig as ModelConfig
  from jaxsparse.config import MoEConfig as MoEConfig
  from jaxsparse.config import MultiModalConfig as MultiModalConfig
  from jaxsparse.config import RopeScalingConfig as RopeScalingConfig
  from jaxsparse.config import SparseAttentionConfig as SparseAttentionConfig
  from jaxsparse.config import VisionConfig as VisionConfig
  from jaxsparse.inference.trained_model import load as load
  from jaxsparse.mesh import Axes as Axes
  from jaxsparse.nn.attention.dcmha import DCMHA as DCMHA
  from jaxsparse.nn.attention.sparse import SparseAttention as SparseAttention
  from jaxsparse.nn.experts import MoE as MoE
  from jaxsparse.nn.memory.layer import MemoryLayer as MemoryLayer
  from jaxsparse.nn.memory.row_gradients import (
    row_value_and_grad as row_value_and_grad,
  )
  from jaxsparse.nn.multimodal.encoder import (
    MultiModalEncoder as MultiModalEncoder,
  )
  from jaxsparse.nn.multimodal.patch_encoder import PatchEncoder as PatchEncoder
  from jaxsparse.nn.transformer import Transformer as Transformer
  from jaxsparse.ops.memory.product_key import (
    product_key_top_m as product_key_top_m,
  )
  from jaxsparse.ops.memory.row_gradient import RowGradient as RowGradient
  from jaxsparse.ops.memory.tucker import tucker_top_m as tucker_top_m
  from jaxsparse.ops.memory.value_bag import value_bag as value_bag
  from jaxsparse.training.optimizers.finalizing import partition as partition
  from jaxsparse.training.optimizers.row_optimizers import (
    row_adagrad as row_adagrad,
  )
  from jaxsparse.training.optimizers.row_optimizers import row_adam as row_adam
  from jaxsparse.training.optimizers.row_updates import (
    apply_updates as apply_updates,
  )
  from jaxsparse.training.optimizers.row_updates import (
    clip_by_global_norm as clip_by_global_norm,
  )

__version__ = '0.1.0'

# Where each name is from.
_HOMES = {
  'Axes': 'mesh',
  'DCMHA': 'nn.attention.dcmha',
  'DCMHAConfig': 'config',
  'MemoryConfig': 'config',
  'MemoryLayer': 'nn.memory.layer',
  'MoE': 'nn.experts',
  'MoEConfig': 'config',
  'ModelConfig': 'config',
  'MultiModalConfig': 'config',
  'MultiModalEncoder': 'nn.multimodal.encoder',
  'PatchEncoder': 'nn.multimodal.patch_encoder',
  'RopeScalingConfig': 'config',
  'RowGradient': 'ops.memory.row_gradient',
  'SparseAttention': 'nn.attention.sparse',
  'SparseAttentionConfig': 'config',
  'Transformer': 'nn.transformer',
  'VisionConfig': 'config',
  'apply_updates': 'training.optimizers.row_updates',
  'clip_by_global_norm': 'training.optimizers.row_updates',
  'load': 'inference.trained_model',
  'partition': 'training.optimizers.finalizing',
  'product_key_top_m': 'ops.memory.product_key',
  'row_adagrad': 'training.optimizers.row_optimizers',
  'row_adam': 'training.optimizers.row_optimizers',
  'row_value_and_grad': 'nn.memory.row_gradients',
  'tucker_top_m': 'ops.memory.tucker',
  'value_bag': 'ops.memory.value_bag',
}

__all__ = [*_HOMES, '__version__']  # pyright: ignore[reportUnsupportedDunderAll]


# A type checker that saw it would take any name for one of ours.
if not TYPE_CHECKING:

  def __getattr__(name: str) -> Any:
    if name not in _HOMES:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
  return sorted(__all__)
