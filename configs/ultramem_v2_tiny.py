"""A small UltraMemV2 (arXiv:2508.18756).

  python train.py --config=configs/ultramem_v2_tiny.py \\
    --workdir=runs/ultramem_v2_tiny

Reproduces: our own comparison at this size, see `dense_tiny`, whose FLOPs per
token it has to 1 %, and whose text, steps and rates. Four layers see half each
of 16,384 values and pre-values; 1.88M parameters.
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
      mlp_dim=252,
      mlp='swiglu',
      memory=c.MemoryConfig.ultramem_v2(
        num_keys=90,
        key_dim=32,
        num_selected=16,
        value_dim=32,
        pre_value_dim=32,
        expansion=1,
        shared_rows=4 * 64**2,
        placements=((0, 0), (1, 1), (2, 2), (3, 3)),
      ),
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(
      learning_rate=3e-3, warmup_steps=50, value_lr_multiplier=10.0
    ),
    train=c.TrainConfig(num_steps=600),
  )
