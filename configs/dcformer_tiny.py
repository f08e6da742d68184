"""Dynamically composable heads: bytes, two minutes on two CPU cores.

  python train.py --config=configs/dcformer_tiny.py --workdir=runs/dcformer_tiny

Reproduces: nothing published; a DCFormer++ of our own size, local blocks of 32
bytes and global ones by turns. configs/compare/attention.py has its controls,
with the same QK-norm and windows.
Hardware: two CPU cores.
Result: 2.320 bits/byte on 655,387 bytes of Python's text, mean of three seeds
(2.331, 2.270, 2.357), and 2.436 without composition
(results/compare_attention.json).
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=2,
      model_dim=96,
      num_heads=8,
      num_kv_heads=8,
      head_dim=12,
      mlp_dim=256,
      use_qk_norm=True,
      attention_pattern=('local', 'global'),
      window=32,
      dcmha=c.DCMHAConfig(),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    train=c.TrainConfig(num_steps=500),
  )
