# SPDX-License-Identifier: Apache-2.0
"""Sparse in all its parts: UltraMem, composed heads, sparse attention; bytes.

  python train.py --config=configs/joined.py:tiny --workdir=runs/joined_tiny

tiny
  Reproduces: nothing published. Local blocks of 64 bytes with composed heads
  (DCMHA) and blocks of sparse attention by turns; one memory layer of 16,384
  slots reads block 1 and is added after block 2. It reads input of any length
  in constant memory, as configs/sparse_attention.py says.
  Hardware: two CPU cores.
  Result: 2.371 bits/byte on 655,387 bytes of Python's text, one seed.
"""

from jaxsparse import config as c

SIZES = {'tiny': dict(num_layers=4, model_dim=128, num_heads=8, mlp_dim=256)}


def get_config(size: str) -> c.Config:
  sizes = SIZES[size]
  num_heads = sizes['num_heads']
  return c.Config(
    model=c.ModelConfig(
      num_kv_heads=num_heads,
      head_dim=sizes['model_dim'] // num_heads,
      qk_norm='head',
      attention_pattern=('local', 'sparse'),
      window=64,
      dcmha=c.DCMHAConfig(),
      sparse=c.SparseAttentionConfig(
        block=16, tile=16, window_blocks=2, max_blocks=8
      ),
      memory=c.MemoryConfig.ultramem(
        num_keys=128,
        key_dim=32,
        num_heads=2,
        num_selected=16,
        value_dim=64,
        placements=((1, 2),),
      ),
      **sizes,
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=256, batch_size=8),
    optimizer=c.OptimizerConfig(
      learning_rate=2e-3, warmup_steps=50, value_lr_multiplier=10.0
    ),
    train=c.TrainConfig(num_steps=500),
  )
