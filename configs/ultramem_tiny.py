"""A small UltraMem language model: bytes, minutes on two CPU cores.

  python train.py --config=configs/ultramem_tiny.py \\
    --workdir=runs/ultramem_tiny

Reproduces: our own comparison with `dense_tiny` at this size. One memory layer
of 16,384 slots reads block 1 and is added after block 2; the MLPs are narrower
by what it costs, so that both models have the same FLOPs per token to 1 %,
scoring and lookup included. AdamW at 3e-3, 2,048 bytes a step, values at 10x
falling to 1x and without weight decay.
Hardware: two CPU cores.
Result: 2.103 bits/byte on 655,387 bytes of Python's text, mean of seeds 0, 1, 2
(2.090 to 2.118); 7,900 to 8,200 tokens/s, 3:05 minutes; see results/tiny.json.
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
      mlp_dim=280,
      mlp='swiglu',
      memory=c.MemoryConfig(
        num_keys=128,
        key_dim=32,
        num_heads=2,
        num_selected=16,
        value_dim=64,
        expansion=4,
        tucker_rank=2,
        num_cores=2,
        placements=((1, 2),),
      ),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(
      learning_rate=3e-3,
      warmup_steps=50,
      value_lr_multiplier=10.0,
      value_weight_decay=0.0,
    ),
    train=c.TrainConfig(num_steps=600),
  )
