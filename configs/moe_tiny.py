"""A small mixture of experts: two of six.

  python train.py --config=configs/moe_tiny.py \\
    --workdir=runs/moe_tiny

Reproduces: our own comparison at this size, see `dense_tiny`, whose FLOPs per
token it has to 1 %, and whose text, steps and rates. Every MLP is six experts,
of which a token passes two; 1.9M parameters.
Hardware: two CPU cores.
Result: see results/compare_cpu.json.
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
      mlp='swiglu',
      moe=c.MoEConfig(num_experts=6, num_used=2, expert_dim=176),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    train=c.TrainConfig(num_steps=600),
  )
