# SPDX-License-Identifier: Apache-2.0
"""OLMoE: many small experts, eight of them active (arXiv:2409.02060).

  python train.py --config=configs/olmoe.py:tiny --workdir=runs/olmoe_tiny
  python train.py --config=configs/olmoe.py:227m \\
    --config.data.tfds=lm1b --workdir=gs://...

tiny
  Reproduces: `olmoe:227m` at the size of our own comparison, see `dense:tiny`,
  whose FLOPs per token it has, and whose text, steps and rates: eight of 96
  experts. OLMoE's router: eight experts by the shares of a softmax over all,
  not renormalised; balance 0.01, z-loss 1e-3 (arXiv:2409.02060).
  Hardware: two CPU cores.
  Result: 2.112 bits/byte on 655,387 bytes of Python's text (seed 0, 600 steps);
  the mean of three seeds of `dense:tiny` is 2.107 (results/tiny.json).

227m
  Reproduces: the OLMoE row of the open 227M/1.2B family in arXiv:2508.18756,
  Table 10: 64 experts, 8 of them active, 1.18B parameters without embeddings.
  The family reads 768 sequences of 4,096 tokens a step and 5e11 tokens of the
  OLMoE mix with the GPT-NeoX tokenizer. OLMoE's losses: balance 0.01, router
  z-loss 1e-3, weights not renormalised (arXiv:2409.02060).
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Blocks, width D, heads, width of the MLP of a dense model, experts, their
# width.
SIZES = {
  'tiny': (4, 128, 4, 352, 96, 40),
  '227m': (20, 768, 12, 3072, 64, 384),
}


def get_config(size: str) -> c.Config:
  num_layers, model_dim, num_heads, mlp_dim, experts, width = SIZES[size]
  model = dict(
    num_layers=num_layers,
    model_dim=model_dim,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=model_dim // num_heads,
    mlp_dim=mlp_dim,
    mlp='swiglu',
    moe=c.MoEConfig(
      num_experts=experts,
      num_experts_per_token=8,
      expert_dim=width,
      normalize_weights=False,
    ),
  )
  if size == 'tiny':
    return c.Config(
      model=c.ModelConfig(**model),
      data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
      optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
      train=c.TrainConfig(num_steps=600),
    )
  return c.Config(
    model=c.ModelConfig(
      vocab_size=50_304, dtype='bfloat16', use_remat=True, **model
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=4096, batch_size=768
    ),
    optimizer=c.OptimizerConfig(learning_rate=4e-4, warmup_steps=3179),
    train=c.TrainConfig(
      num_steps=158_946, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
