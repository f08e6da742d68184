# SPDX-License-Identifier: Apache-2.0
"""Mixtures of two active experts: those of the UltraMem paper, and a tiny one.

  python train.py --config=configs/moe.py:tiny --workdir=runs/moe_tiny
  python train.py --config=configs/moe.py:151m \\
    --config.data.tfds=lm1b --workdir=gs://...

tiny
  Reproduces: our own comparison at this size, see `dense:tiny`, whose FLOPs per
  token it has to 1 %, and whose text, steps and rates. Every MLP is six
  experts, of which a token passes two; 1.9M parameters.
  Hardware: two CPU cores.
  Result: see results/compare_cpu.json.

151m, 680m, 1b6
  Reproduces: MoE-2in32, MoE-2in33 and MoE-2in34 of arXiv:2411.12364, Table 1,
  beside Dense-151M, Dense-680M and Dense-1.6B: 2.04B, 8.95B and 21.36B
  parameters without embeddings, 0.35, 1.50 and 3.52 GFLOPs per token, on 1.0e12
  tokens. Two of 32, 33 and 34 experts of two matrices; their widths 2528, 3584
  and 4672 are inverted from the parameters. Batch, sequence, steps, learning
  rate and dropout are those of the paper's dense models. Not given there and
  chosen here: a softmax router, balance loss 0.01 and z-loss 1e-3. The experts
  are split over `mesh.sparse`, which must divide them.
  Hardware: an accelerator pod; traced for 2,048, 64 and 128 devices, not yet
  trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Blocks, width D, heads, experts, width of an expert, learning rate.
SIZES = {
  'tiny': (4, 128, 4, 6, 176, 3e-3),
  '151m': (12, 1024, 16, 32, 2528, 6e-4),
  '680m': (24, 1536, 12, 33, 3584, 2.5e-4),
  '1b6': (32, 2048, 16, 34, 4672, 2e-4),
}


def get_config(size: str) -> c.Config:
  num_layers, model_dim, num_heads, experts, width, learning_rate = SIZES[size]
  shape = dict(
    num_layers=num_layers,
    model_dim=model_dim,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=model_dim // num_heads,
    moe=c.MoEConfig(
      num_experts=experts, num_experts_per_token=2, expert_dim=width
    ),
  )
  if size == 'tiny':
    return c.Config(
      model=c.ModelConfig(mlp_dim=352, mlp='swiglu', **shape),
      data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
      optimizer=c.OptimizerConfig(learning_rate=learning_rate, warmup_steps=50),
      train=c.TrainConfig(num_steps=600),
    )
  return c.Config(
    model=c.ModelConfig(
      mlp_dim=width,
      mlp='gelu',
      vocab_size=50_304,
      dropout_rate=0.1,
      dtype='bfloat16',
      use_remat=True,
      **shape,
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=2048, batch_size=2048
    ),
    optimizer=c.OptimizerConfig(learning_rate=learning_rate, warmup_steps=2384),
    train=c.TrainConfig(
      num_steps=238_418, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
