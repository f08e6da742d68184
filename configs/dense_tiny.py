"""The dense baseline of `ultramem_tiny`: bytes, minutes on two CPU cores.

  python train.py --config=configs/dense_tiny.py --workdir=runs/dense_tiny

Reproduces: the dense row of our own comparison at this size, with the FLOPs per
token of `ultramem_tiny` to 1 %. AdamW at 3e-3, 2,048 bytes a step.
Hardware: two CPU cores.
Result: 2.107 bits/byte on 655,387 bytes of Python's text, mean of seeds 0, 1, 2
(2.100 to 2.119); 9,600 to 11,000 tokens/s; see results/tiny.json.
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
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    train=c.TrainConfig(num_steps=600),
  )
