"""DCPythia 6.9B: composed heads on Pythia's recipe, on 3.0e11 tokens.

  python train.py --config=configs/dcpythia_6b9.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: the DCPythia of 6.9B of arXiv:2405.08553, whose training text was
the Pile: LayerNorm, biases, attention and MLP side by side, rotation of a
quarter of each head, QK-norm, windows of 256 by turns, 143,000 steps of 2.1M
tokens with 1 % of them as warm-up.
Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=32,
      model_dim=4096,
      num_heads=32,
      num_kv_heads=32,
      head_dim=128,
      mlp_dim=16384,
      mlp='gelu_erf',
      vocab_size=50_304,
      tie_embeddings=False,
      use_qk_norm=True,
      norm='layer',
      qk_norm_epsilon=1e-6,
      init_deviations=(0.02, 0.0025),
      use_bias=True,
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
      learning_rate=1.2e-4, warmup_steps=1430, weight_decay=0.01
    ),
    train=c.TrainConfig(
      num_steps=143_000, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
