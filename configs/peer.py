# SPDX-License-Identifier: Apache-2.0
"""PEER: one-neuron experts (arXiv:2407.04153).

  python train.py --config=configs/peer.py:tiny --workdir=runs/peer_tiny

tiny
  Reproduces: our own comparison at this size, see `dense:tiny`, whose FLOPs per
  token it has to 1 %, and whose text, steps and rates. 4,096 experts in place
  of the MLP of block 1, 4 heads of 8; 1.87M parameters.
  Hardware: two CPU cores.
  Result: see results/compare_cpu.json.
"""

from jaxsparse import config as c

# Sizes of the model, and of its layer of experts.
SIZES = {
  'tiny': (
    dict(num_layers=4, model_dim=128, num_heads=4, mlp_dim=420),
    dict(num_keys=64, key_dim=32, num_heads=4, num_selected=8),
  ),
}


def get_config(size: str) -> c.Config:
  sizes, memory = SIZES[size]
  model_dim, num_heads = sizes['model_dim'], sizes['num_heads']
  return c.Config(
    model=c.ModelConfig(
      num_kv_heads=num_heads,
      head_dim=model_dim // num_heads,
      mlp='swiglu',
      memory=c.MemoryConfig.peer(
        value_dim=model_dim,
        pre_value_dim=model_dim,
        placements=((1, 1),),
        **memory,
      ),
      **sizes,
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(
      learning_rate=3e-3, warmup_steps=50, value_lr_multiplier=10.0
    ),
    train=c.TrainConfig(num_steps=600),
  )
