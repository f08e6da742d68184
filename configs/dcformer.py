# SPDX-License-Identifier: Apache-2.0
"""DCFormer++ (arXiv:2405.08553): dynamically composable heads.

  python train.py --config=configs/dcformer.py:tiny --workdir=runs/dcformer_tiny
  python train.py --config=configs/dcformer.py:405m \\
    --config.data.tfds=lm1b --workdir=gs://...

tiny
  Reproduces: nothing published; a DCFormer++ of our own size, local blocks of
  32 bytes and global ones by turns. configs/compare/attention.py has its
  controls, with the same QK-norm and windows.
  Hardware: two CPU cores, two minutes.
  Result: 2.320 bits/byte on 655,387 bytes of Python's text, mean of three seeds
  (2.331, 2.270, 2.357), and 2.436 without composition
  (results/compare_attention.json).

405m, 834m, 1b4
  Reproduces: the 405M, 834M and 1.4B of the scaling runs of arXiv:2405.08553,
  on 7.1e9, 15.2e9 and 26.2e9 tokens: 411M, 834M and 1,420M parameters with two
  tables of 50,257 tokens, and 8.3M, 18.6M and 33.0M of the composition. SwiGLU,
  RMSNorm, QK-norm, local blocks of 256 tokens and global ones by turns,
  composition of rank 2 over all heads without a base; AdamW with 1 % of the
  steps as warm-up, as the authors' configs have it.
  They read the Pile with the Pythia tokenizer: give its file as
  `--config.data.tokenizer=tokenizer.json`.
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.

2b8, 6b9
  Reproduces: the 2.8B and 6.9B of arXiv:2405.08553, on 3.0e11 tokens: 2,795M
  and 6,888M parameters with two tables of 50,257 tokens, and 54.5M and 86.0M of
  the composition. As the smaller ones, and 143,000 steps of 2.1M tokens with
  1 % of them as warm-up, to 1 % of the learning rate. The 6.9B was used for
  speed only; its learning rate is chosen here, its initial values are as those
  of the 2.8B.
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Blocks, width D, heads, width of the MLP, learning rate.
SIZES = {
  'tiny': (2, 96, 8, 256, 2e-3),
  '405m': (24, 1024, 16, 2816, 3e-4),
  '834m': (24, 1536, 24, 4096, 2.5e-4),
  '1b4': (24, 2048, 32, 5504, 2e-4),
  '2b8': (32, 2560, 32, 6912, 3.2e-4),
  '6b9': (32, 4096, 32, 11_008, 2.4e-4),
}
# Steps of warm-up and steps of the scaling runs.
SCALING = {'405m': (135, 13_500), '834m': (290, 29_000), '1b4': (500, 50_000)}


def get_config(size: str) -> c.Config:
  num_layers, model_dim, num_heads, mlp_dim, learning_rate = SIZES[size]
  model = dict(
    num_layers=num_layers,
    model_dim=model_dim,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=model_dim // num_heads,
    mlp_dim=mlp_dim,
    qk_norm='head',
    attention_pattern=('local', 'global'),
    dcmha=c.DCMHAConfig(),
  )
  if size == 'tiny':
    return c.Config(
      model=c.ModelConfig(window=32, **model),
      data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
      optimizer=c.OptimizerConfig(learning_rate=learning_rate, warmup_steps=50),
      train=c.TrainConfig(num_steps=500),
    )
  is_scaling = size in SCALING
  warmup_steps, num_steps = SCALING.get(size, (1430, 143_000))
  deviations = (0.006, 0.006)
  if not is_scaling:
    deviations = (
      (2 / (5 * model_dim)) ** 0.5,
      2 / (num_layers * model_dim**0.5),
    )
  return c.Config(
    model=c.ModelConfig(
      vocab_size=50_304,
      tie_embeddings=False,
      norm_epsilon=1e-6,
      init_deviations=deviations,
      window=256,
      query_chunk=128,
      dtype='bfloat16',
      use_remat=True,
      **model,
    ),
    data=c.DataConfig(
      tokenizer='bpe',
      bpe_vocab_size=50_257,
      seq_len=2048,
      batch_size=256 if is_scaling else 1024,
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=learning_rate,
      warmup_steps=warmup_steps,
      final_lr_fraction=0.1 if is_scaling else 0.01,
    ),
    train=c.TrainConfig(
      num_steps=num_steps,
      save_every=1000,
      eval_every=5000,
      sample_prompt='The ',
    ),
  )
