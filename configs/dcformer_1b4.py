"""DCFormer++ 1.4B: dynamically composable heads, on 26.2e9 tokens.

  python train.py --config=configs/dcformer_1b4.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: the 1.4B of the scaling runs of arXiv:2405.08553: 1,420M parameters
with two tables of 50,257 tokens, and 33.0M of the composition. SwiGLU, RMSNorm,
QK-norm, local blocks of 256 tokens and global ones by turns, composition of
rank 2 over all heads without a base; AdamW with 1 % of the steps as warm-up, as
the authors' configs have it.
They read the Pile with the Pythia tokenizer: give its file as
`--config.data.tokenizer=tokenizer.json`.
Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=24,
      model_dim=2048,
      num_heads=32,
      num_kv_heads=32,
      head_dim=64,
      mlp_dim=5504,
      vocab_size=50_304,
      tie_embeddings=False,
      use_qk_norm=True,
      norm_epsilon=1e-6,
      init_deviations=(0.006, 0.006),
      attention_pattern=('local', 'global'),
      window=256,
      query_chunk=128,
      dcmha=c.DCMHAConfig(),
      dtype='bfloat16',
      use_remat=True,
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_257, seq_len=2048, batch_size=256
    ),
    optimizer=c.OptimizerConfig(learning_rate=2e-4, warmup_steps=500),
    train=c.TrainConfig(
      num_steps=50_000, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
