# SPDX-License-Identifier: Apache-2.0
"""A comparison that trains in a moment."""

import dataclasses

from jaxsparse.config import (
  Config,
  DataConfig,
  MemoryConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
)
from jaxsparse.data import facts
from jaxsparse.experiments.compare.suite import Architecture, Suite


def facts_suite(cache_dir, **fields):
  base = Config(
    model=ModelConfig(
      num_layers=1,
      model_dim=16,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      mlp_dim=150,
      vocab_size=facts.VOCAB_SIZE,
    ),
    data=DataConfig(seq_len=16, batch_size=8, cache_dir=str(cache_dir)),
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(num_steps=3, log_every=1, save_every=1),
  )
  architectures = dict(
    dense=Architecture(),
    ultramem=Architecture(
      memory=MemoryConfig(
        num_keys=16,
        key_dim=4,
        num_heads=2,
        num_selected=4,
        value_dim=16,
        placements=((0, 0),),
      ),
      optimizer=dict(value_lr_multiplier=3.0),
    ),
  )
  suite = Suite(
    base=base,
    total_parameters=60_000,
    architectures=architectures,
    seeds=(0,),
    people=(12,),
    num_phrasings=2,
  )
  return dataclasses.replace(suite, **fields)
