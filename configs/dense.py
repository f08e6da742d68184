# SPDX-License-Identifier: Apache-2.0
"""Dense transformers: the baselines of the UltraMem paper, and a tiny one.

  python train.py --config=configs/dense.py:tiny --workdir=runs/dense_tiny
  python train.py --config=configs/dense.py:151m \\
    --config.data.tfds=lm1b --workdir=gs://...

tiny
  Reproduces: the dense row of our own comparison at this size, with the FLOPs
  per token of `ultramem:tiny` to 1 %. AdamW at 3e-3, 2,048 bytes a step.
  Hardware: two CPU cores, minutes.
  Result: 2.107 bits/byte on 655,387 bytes of Python's text, mean of seeds 0, 1,
  2 (2.100 to 2.119); 9,600 to 11,000 tokens/s; see results/tiny.json.

151m, 680m, 1b6
  Reproduces: Dense-151M, Dense-680M and Dense-1.6B of arXiv:2411.12364, Table
  1: 150.99M, 679.5M and 1610.6M parameters without embeddings, 0.30, 1.36 and
  3.21 GFLOPs per token, on 1.0e12 tokens. From the paper: width, blocks, GELU
  MLP of 4 D, batch, sequence, steps, learning rate, dropout. Not given there
  and chosen here: heads of 64 (151m) and of 128, tied embeddings, rotary
  positions, clipping at 1.0. The paper reads RedPajama with the GPT-NeoX
  tokenizer: give its file as `--config.data.tokenizer=tokenizer.json`; by
  default a BPE of that size is trained on the corpus.
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Blocks, width D, heads, width of the MLP, learning rate.
SIZES = {
  'tiny': (4, 128, 4, 352, 3e-3),
  '151m': (12, 1024, 16, 4096, 6e-4),
  '680m': (24, 1536, 12, 6144, 2.5e-4),
  '1b6': (32, 2048, 16, 8192, 2e-4),
}


def get_config(size: str) -> c.Config:
  num_layers, model_dim, num_heads, mlp_dim, learning_rate = SIZES[size]
  shape = dict(
    num_layers=num_layers,
    model_dim=model_dim,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=model_dim // num_heads,
    mlp_dim=mlp_dim,
  )
  if size == 'tiny':
    return c.Config(
      model=c.ModelConfig(mlp='swiglu', **shape),
      data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
      optimizer=c.OptimizerConfig(learning_rate=learning_rate, warmup_steps=50),
      train=c.TrainConfig(num_steps=600),
    )
  return c.Config(
    model=c.ModelConfig(
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
