# SPDX-License-Identifier: Apache-2.0
"""Memory+ (arXiv:2412.09764): one table for all layers, gated.

  python train.py --config=configs/memory_plus.py:tiny \\
    --workdir=runs/memory_plus_tiny
  python train.py --config=configs/memory_plus.py:227m \\
    --config.data.tfds=lm1b --workdir=gs://...

tiny
  Reproduces: our own comparison at this size, see `dense:tiny`, whose FLOPs per
  token it has to 1 %, and whose text, steps and rates. One table of 8,100
  values in place of the MLPs of blocks 1 and 3; 1.87M parameters.
  Hardware: two CPU cores.
  Result: see results/compare_cpu.json.

227m
  Reproduces: the Memory+ row of the open 227M/1.2B family in arXiv:2508.18756,
  Table 10, as the official UltraMem release has it: 1.19B parameters without
  embeddings (1.197B here), 994.6M of them values. Four layers of one table
  beside the MLPs, 2 heads of 80 slots, raw keys, no query bias; values at a
  constant rate of 1e-3 (arXiv:2412.09764). The family reads 768 sequences of
  4,096 tokens a step and 5e11 tokens of the OLMoE mix with the GPT-NeoX
  tokenizer. Memory+ as its authors describe it replaces the MLP (replaces_mlp)
  and normalises keys (key_norm='rms').
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Sizes of the model, and of its memory layers.
SIZES = {
  'tiny': (
    dict(num_layers=4, model_dim=128, num_heads=4, mlp_dim=536),
    dict(num_keys=90, key_dim=32, num_selected=16, placements=((1, 1), (3, 3))),
  ),
  '227m': (
    dict(num_layers=20, model_dim=768, num_heads=12, mlp_dim=3008),
    dict(
      num_keys=1138,
      key_dim=384,
      num_selected=80,
      placements=((4, 4), (8, 8), (12, 12), (16, 16)),
      query_bias=False,
      key_norm='none',
      replaces_mlp=False,
    ),
  ),
}


def get_config(size: str) -> c.Config:
  sizes, memory = SIZES[size]
  model_dim, num_heads = sizes['model_dim'], sizes['num_heads']
  model = dict(
    num_kv_heads=num_heads,
    head_dim=model_dim // num_heads,
    mlp='swiglu',
    memory=c.MemoryConfig.memory_plus(
      num_heads=2, value_dim=model_dim, **memory
    ),
    **sizes,
  )
  if size == 'tiny':
    return c.Config(
      model=c.ModelConfig(**model),
      data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
      optimizer=c.OptimizerConfig(
        learning_rate=3e-3, warmup_steps=50, value_lr_multiplier=10.0
      ),
      train=c.TrainConfig(num_steps=600),
    )
  return c.Config(
    model=c.ModelConfig(
      vocab_size=50_304, dtype='bfloat16', use_remat=True, **model
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=4096, batch_size=768
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=4e-4,
      warmup_steps=3179,
      value_learning_rate=1e-3,
      value_weight_decay=0.1,
    ),
    train=c.TrainConfig(
      num_steps=158_946, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
