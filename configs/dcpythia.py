# SPDX-License-Identifier: Apache-2.0
"""DCPythia (arXiv:2405.08553): composed heads on Pythia's recipe.

  python train.py --config=configs/dcpythia.py:2b8 \\
    --config.data.tfds=lm1b --workdir=gs://...

2b8, 6b9
  Reproduces: the DCPythia of 2.8B and of 6.9B of arXiv:2405.08553, on 3.0e11
  tokens of the Pile: LayerNorm, biases, attention and MLP side by side,
  rotation of a quarter of each head, QK-norm, windows of 256 by turns, 143,000
  steps of 2.1M tokens with 1 % of them as warm-up.
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Width D, width of the MLP, standard deviations at the start, learning rate.
SIZES = {
  '2b8': (
    2560,
    10_240,
    ((2 / (5 * 2560)) ** 0.5, 2 / (32 * 2560**0.5)),
    1.6e-4,
  ),
  '6b9': (4096, 16_384, (0.02, 0.0025), 1.2e-4),
}


def get_config(size: str) -> c.Config:
  model_dim, mlp_dim, deviations, learning_rate = SIZES[size]
  return c.Config(
    model=c.ModelConfig(
      num_layers=32,
      model_dim=model_dim,
      num_heads=32,
      num_kv_heads=32,
      head_dim=model_dim // 32,
      mlp_dim=mlp_dim,
      mlp='gelu_erf',
      vocab_size=50_304,
      tie_embeddings=False,
      qk_norm='head',
      norm='layer',
      qk_norm_epsilon=1e-6,
      init_deviations=deviations,
      bias='all',
      parallel_block=True,
      rope_fraction=0.25,
      attention_pattern=('local', 'global'),
      window=256,
      query_chunk=128,
      dcmha=c.DCMHAConfig(),
      dtype='bfloat16',
      use_remat=True,
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_257, seq_len=2048, batch_size=1024
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=learning_rate, warmup_steps=1430, weight_decay=0.01
    ),
    train=c.TrainConfig(
      num_steps=143_000, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
