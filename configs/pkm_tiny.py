"""A small product-key memory (arXiv:1907.05242).

  python train.py --config=configs/pkm_tiny.py \\
    --workdir=runs/pkm_tiny

Reproduces: our own comparison at this size, see `dense_tiny`, whose FLOPs per
token it has to 1 %, and whose text, steps and rates. 8,100 values of the
model's width beside the MLP of block 1; 1.87M parameters.
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
      mlp_dim=332,
      mlp='swiglu',
      memory=c.MemoryConfig.pkm(
        num_keys=90,
        key_dim=32,
        num_heads=2,
        num_selected=16,
        value_dim=128,
        placements=((1, 1),),
      ),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(
      learning_rate=3e-3, warmup_steps=50, value_lr_multiplier=10.0
    ),
    train=c.TrainConfig(num_steps=600),
  )
