# SPDX-License-Identifier: Apache-2.0
"""Whom `bench train` compares, and at which sizes."""

from jaxsparse.analysis.cost import training_flops
from jaxsparse.config import Config, DataConfig, ModelConfig
from jaxsparse.run import command_line

SIZES = ('tiny', '25m')
# Ours, and a plain dense model in PyTorch; UltraMem has its FLOPs per token.
OURS = ('jaxsparse dense', 'jaxsparse ultramem')
TORCH = ('torch', 'torch.compile')


def config_of(contender: str, size: str) -> Config:
  """The run of one contender.

  `tiny` is our recipe of that name, of 128 tokens in 16 sequences; `25m` has
  width 512, 8 blocks, 256 tokens in 8 sequences.
  """
  if size == '25m':
    model = ModelConfig(
      num_layers=8,
      model_dim=512,
      num_heads=8,
      num_kv_heads=8,
      head_dim=64,
      mlp_dim=1360,
      vocab_size=256,
    )
    return Config(model=model, data=DataConfig(seq_len=256, batch_size=8))
  family = 'ultramem' if contender.endswith('ultramem') else 'dense'
  config = command_line.read_recipe(f'{family}:{size}')
  config.model.vocab_size = 257
  return config


def contenders(size: str, peer: str) -> list[str]:
  """All that run at a size; the first is what the others are compared with."""
  ours = OURS if size == 'tiny' else OURS[:1]
  return [*(TORCH if peer == 'torch' else ()), *ours]


def flops(config: Config) -> int:
  """FLOPs of training per token."""
  return training_flops(config.model, config.data.seq_len)
