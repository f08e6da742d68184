"""Dynamic sparse attention: bytes, minutes on two CPU cores.

  python train.py --config=configs/sparse_attention_tiny.py \\
    --workdir=runs/sparse_attention_tiny

Reproduces: nothing published. Every block reads a window of 32 to 48 bytes and
10 to 30 % of the blocks of 16 bytes before it, and summaries of the others.
configs/compare/sparse_attention.py has its controls. As no block sees
everything, it reads input of any length in constant memory:

  python -m jaxsparse.generate --workdir=runs/sparse_attention_tiny \\
    --prompt_file=book.txt

Hardware: two CPU cores.
Result: 2.593 bits/byte on 655,387 bytes of Python's text, mean of three seeds
(2.629, 2.502, 2.646; results/compare_sparse_attention.json). Of 1,000,000 bytes
of that text, read by generate on one core, every stretch of some 35,000 was at
1.6 to 2.0 nats/byte, at 6,000 to 8,200 bytes/s, in 650 MB of memory: none is
slower or worse than the first.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=3,
      model_dim=96,
      num_heads=4,
      num_kv_heads=4,
      head_dim=24,
      mlp_dim=256,
      use_qk_norm=True,
      attention_pattern=('sparse',),
      sparse=c.SparseAttentionConfig(
        block=16,
        tile=16,
        window_blocks=2,
        # 30 % of the 29 blocks before the last window.
        max_blocks=9,
        min_fraction=0.1,
        max_fraction=0.3,
      ),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=512, batch_size=4),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    train=c.TrainConfig(num_steps=500),
  )
