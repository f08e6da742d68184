"""A small mixture of many small experts: eight of 96.

  python train.py --config=configs/olmoe_tiny.py \\
    --workdir=runs/olmoe_tiny

Reproduces: `olmoe_227m` at the size of our own comparison, see `dense_tiny`,
whose FLOPs per token it has, and whose text, steps and rates. OLMoE's router:
eight experts by the shares of a softmax over all, not renormalised; balance
0.01, z-loss 1e-3 (arXiv:2409.02060).
Hardware: two CPU cores.
Result: 2.112 bits/byte on 655,387 bytes of Python's text (seed 0, 600 steps);
the mean of three seeds of dense_tiny is 2.107 (results/tiny.json).
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=4,
      model_dim=128,
      num_heads=4,
      num_kv_heads=4,
      head_dim=32,
      mlp_dim=352,
      moe=c.MoEConfig(
        num_experts=96, num_used=8, expert_dim=40, normalize_weights=False
      ),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    train=c.TrainConfig(num_steps=600),
  )
