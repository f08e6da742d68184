# SPDX-License-Identifier: Apache-2.0
"""Language modelling at a size that uses a GPU: 9 minutes of one H100.

  python -m jaxsparse bench gpu language --text=TEXT --json=language.json
  python -m jaxsparse compare --suite=configs/compare/h100.py \\
    --workdir=runs/compare_h100 --text=TEXT

The dense model has 26M parameters beside its embeddings; the sparse ones have
its FLOPs per token and eight times its parameters. 480 steps of 131,072 bytes
are 62.9M, so give a text of that size, such as enwik8; Python's own sources,
the default, would be read five times. A model takes 12.9 PFLOPs, 4 x 44 s at
30 % of the peak, and the sparse ones read 100 GB of rows a step and more: one
to two minutes each. Not run yet: these are estimates. Compiled ahead of
time for an H100, a step of UltraMem holds 13 GB (tests/aot).
"""

from jaxsparse import config as c
from jaxsparse.experiments.compare.suite import Architecture, Suite

WIDTH = 512
LAYERS = 8
SKIPPING = ((1, 2), (3, 4), (5, 6))
INSTEAD = ((1, 1), (3, 3), (5, 5))


def get_suite() -> Suite:
  base = c.Config(
    model=c.ModelConfig(
      num_layers=LAYERS,
      model_dim=WIDTH,
      num_heads=8,
      num_kv_heads=8,
      head_dim=64,
      mlp_dim=1408,
      # 256 bytes and the boundary, and up to a multiple of 64.
      vocab_size=320,
      dtype='bfloat16',
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=1024, batch_size=128),
    optimizer=c.OptimizerConfig(
      learning_rate=1e-3, warmup_steps=50, grad_accumulation=4
    ),
    train=c.TrainConfig(num_steps=480, log_every=10, save_every=240),
  )
  fast = dict(value_lr_multiplier=4.0)
  return Suite(
    base=base,
    total_parameters=200_000_000,
    seeds=(0,),
    width_multiple=8,
    architectures=dict(
      dense=Architecture(),
      moe=Architecture(
        moe=c.MoEConfig(num_experts=44, num_experts_per_token=4)
      ),
      pkm=Architecture(
        memory=c.MemoryConfig.pkm(
          value_dim=WIDTH, key_dim=128, placements=((3, 3),), num_selected=32
        ),
        optimizer=fast,
      ),
      memory_plus=Architecture(
        memory=c.MemoryConfig.memory_plus(
          value_dim=WIDTH,
          key_dim=128,
          shared_rows=128**2,
          placements=INSTEAD,
          num_heads=2,
        ),
        optimizer=fast,
      ),
      ultramem=Architecture(
        memory=c.MemoryConfig.ultramem(
          value_dim=WIDTH // 2,
          key_dim=128,
          num_selected=32,
          placements=SKIPPING,
        ),
        optimizer=fast,
      ),
      ultramem_v2=Architecture(
        memory=c.MemoryConfig.ultramem_v2(
          value_dim=WIDTH // 4,
          pre_value_dim=WIDTH // 4,
          key_dim=96,
          num_selected=32,
          # Of eight layers, each sees a quarter of the rows.
          shared_rows=4 * 128**2,
          placements=tuple((i, i) for i in range(LAYERS)),
        ),
      ),
    ),
  )
