# SPDX-License-Identifier: Apache-2.0
"""Language modelling at a size that uses a GPU: 25 minutes of one H100.

  python -m jaxsparse compare --suite=configs/compare/h100.py \\
    --workdir=runs/compare_h100 --text='/usr/lib/python3*/**/*.py'

The dense model has 85M parameters beside its embeddings; the sparse ones have
its FLOPs per token and eight times its parameters. 500 steps of 131,072 bytes
are 66 MB, so give a text of that size, such as all Python packages of the
machine; Python's own sources, the default, would be read five times. At a fifth
to a third of the peak a run takes 2 to 3.5 minutes and half a minute to
compile. Not run yet: these are estimates.
"""

from jaxsparse import config as c
from jaxsparse.experiments.compare.suite import Architecture, Suite

WIDTH = 768
LAYERS = 12
SKIPPING = ((1, 3), (4, 6), (7, 9))
INSTEAD = ((2, 2), (5, 5), (8, 8))


def get_suite() -> Suite:
  base = c.Config(
    model=c.ModelConfig(
      num_layers=LAYERS,
      model_dim=WIDTH,
      num_heads=12,
      num_kv_heads=12,
      head_dim=64,
      mlp_dim=2048,
      # 256 bytes and the boundary, and up to a multiple of 64.
      vocab_size=320,
      dtype='bfloat16',
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=1024, batch_size=128),
    optimizer=c.OptimizerConfig(
      learning_rate=1e-3, warmup_steps=50, grad_accumulation=4
    ),
    train=c.TrainConfig(num_steps=500, log_every=10, save_every=250),
  )
  fast = dict(value_lr_multiplier=4.0)
  return Suite(
    base=base,
    total_parameters=680_000_000,
    seeds=(0,),
    width_multiple=16,
    architectures=dict(
      dense=Architecture(),
      moe=Architecture(
        moe=c.MoEConfig(num_experts=64, num_experts_per_token=8)
      ),
      pkm=Architecture(
        memory=c.MemoryConfig.pkm(
          value_dim=WIDTH, key_dim=128, placements=((5, 5),), num_selected=32
        ),
        optimizer=fast,
      ),
      memory_plus=Architecture(
        memory=c.MemoryConfig.memory_plus(
          value_dim=WIDTH,
          key_dim=192,
          shared_rows=128**2,
          placements=INSTEAD,
          num_heads=2,
        ),
        optimizer=fast,
      ),
      ultramem=Architecture(
        memory=c.MemoryConfig.ultramem(
          value_dim=WIDTH // 2,
          key_dim=192,
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
          # Of twelve layers, each sees three twelfths of the rows.
          shared_rows=4 * 128**2,
          placements=tuple((i, i) for i in range(LAYERS)),
        ),
      ),
    ),
  )
