"""A small PEER: one-neuron experts (arXiv:2407.04153).

  python train.py --config=configs/peer_tiny.py \\
    --workdir=runs/peer_tiny

Reproduces: our own comparison at this size, see `dense_tiny`, whose FLOPs per
token it has to 1 %, and whose text, steps and rates. 4,096 experts in place of
the MLP of block 1, 4 heads of 8; 1.87M parameters.
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
      mlp_dim=420,
      mlp='swiglu',
      memory=c.MemoryConfig.peer(
        num_keys=64,
        key_dim=32,
        num_heads=4,
        num_selected=8,
        value_dim=128,
        pre_value_dim=128,
        placements=((1, 1),),
      ),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(
      learning_rate=3e-3, warmup_steps=50, value_lr_multiplier=10.0
    ),
    train=c.TrainConfig(num_steps=600),
  )
