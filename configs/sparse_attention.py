# SPDX-License-Identifier: Apache-2.0
"""Dynamic sparse attention: bytes, minutes on two CPU cores.

  python train.py --config=configs/sparse_attention.py:tiny \\
    --workdir=runs/sparse_attention_tiny

tiny
  Reproduces: nothing published. Every block reads a window of 32 to 48 bytes
  and 10 to 30 % of the blocks of 16 bytes before it, and summaries of the
  others. configs/compare/sparse_attention.py has its controls. As no block sees
  everything, it reads input of any length in constant memory:

    python -m jaxsparse generate --workdir=runs/sparse_attention_tiny \\
      --prompt_file=book.txt

  Hardware: two CPU cores.
  Result: 2.586 bits/byte on 655,387 bytes of Python's text, mean of three seeds
  (2.619, 2.498, 2.641; results/compare_sparse_attention.json). Of a million
  bytes of that text, read on one core, every stretch of 32,768 is at 1.57 to
  2.25 nats/byte, at 11,400 to 19,700 bytes/s, in 682 MB of memory: none is
  slower than the first, and what is read again after 655,360 bytes has the same
  nats within 0.016 (`bench long_input`, results/long_input_cpu.json).
"""

from jaxsparse import config as c

SIZES = {'tiny': dict(num_layers=3, model_dim=96, num_heads=4, mlp_dim=256)}


def get_config(size: str) -> c.Config:
  sizes = SIZES[size]
  num_heads = sizes['num_heads']
  return c.Config(
    model=c.ModelConfig(
      num_kv_heads=num_heads,
      head_dim=sizes['model_dim'] // num_heads,
      qk_norm='head',
      attention_pattern=('sparse',),
      sparse=c.SparseAttentionConfig(
        block=16,
        tile=16,
        window_blocks=2,
        # Rounded up for each tile, these are at most 29.5 % on the mean.
        max_blocks=7,
        min_fraction=0.1,
        max_fraction=0.22,
      ),
      **sizes,
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=512, batch_size=4),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    train=c.TrainConfig(num_steps=500),
  )
