# SPDX-License-Identifier: Apache-2.0
"""A small model of every kind, for tests of slots."""

import dataclasses
import functools

import numpy as np
from parameters import draw

from jaxsparse.config import (
  DCMHAConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  RopeScalingConfig,
  SparseAttentionConfig,
)
from jaxsparse.nn.transformer import Transformer

V = 23

BASE = ModelConfig(
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  vocab_size=V,
)
SMALL = dict(num_keys=8, key_dim=4, num_selected=4)


def with_memory(memory, **fields):
  return dataclasses.replace(BASE, memory=memory, **fields)


def sparse(pattern, **fields):
  config = SparseAttentionConfig(
    block=2, tile=2, window_blocks=1, max_blocks=2, coverage_logit=0.5
  )
  config = dataclasses.replace(config, **fields)
  return dataclasses.replace(
    BASE, attention_pattern=pattern, window=3, sparse=config
  )


MODELS = dict(
  # For the default lane: compiles soonest, and keeps most of what can be lost.
  small=with_memory(
    MemoryConfig(**SMALL, value_dim=8, query_conv_taps=5, placements=((0, 0),)),
    num_layers=1, attention_pattern=('local',), window=3,
  ),
  dense=BASE,
  moe=dataclasses.replace(
    BASE, moe=MoEConfig(num_experts=16, expert_dim=12, num_shared=1)
  ),
  few_experts=dataclasses.replace(
    BASE, moe=MoEConfig(num_experts=4, expert_dim=12)
  ),
  pkm=with_memory(
    MemoryConfig.pkm(**SMALL, num_heads=2, value_dim=16, placements=((1, 1),))
  ),
  peer=with_memory(
    MemoryConfig.peer(
      **SMALL, num_heads=2, value_dim=16, pre_value_dim=16,
      placements=((0, 0),),
    )
  ),
  memory_plus=with_memory(
    MemoryConfig.memory_plus(
      **SMALL, num_heads=2, value_dim=16, shared_rows=64,
      placements=((1, 1),),
    )
  ),
  ultramem=with_memory(
    MemoryConfig(**SMALL, value_dim=8, placements=((0, 1),))
  ),
  convolved=with_memory(
    MemoryConfig(
      **SMALL, value_dim=8, query_conv_taps=5, placements=((0, 1), (1, 1))
    )
  ),
  v2=with_memory(
    MemoryConfig.ultramem_v2(
      **SMALL, value_dim=8, pre_value_dim=4, shared_rows=100,
      placements=((0, 0), (1, 1)),
    )
  ),
  dcmha=dataclasses.replace(
    BASE, attention_pattern=('local', 'global'), window=3,
    dcmha=DCMHAConfig(base=True), query_chunk=2,
  ),
  sparse=sparse(('sparse', 'local')),
  indexed=sparse(('local', 'sparse'), router='indexer', tile=1),
  # With all that published models need besides.
  bounded=dataclasses.replace(
    sparse(('sparse', 'local'), history_blocks=2),
    qk_norm='projection', bias='qkv', norm_placement='post',
    rope_scaling=RopeScalingConfig(original_length=16),
  ),
)  # fmt: skip
MODELS |= {
  f'{name}_int8': dataclasses.replace(MODELS[name], kv_cache='int8')
  for name in ('dcmha', 'indexed', 'bounded')
}


def tolerance(config, atol):
  """Of what other programs compute of the same.

  Numbers that differ in their last bits may be rounded to other codes.
  """
  return atol if config.kv_cache == 'exact' else 0.02


@functools.cache
def make_params(config):
  one = np.ones((1, 2), np.int32)
  return draw(Transformer(config).init, one, one, one)
