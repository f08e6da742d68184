"""The dense 151M baseline of the UltraMem paper, on 1.0e12 tokens.

  python train.py --config=configs/dense_151m.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: Dense-151M of arXiv:2411.12364, Table 1: 150.99M parameters
without embeddings, 0.30 GFLOPs per token. From the paper: width, blocks,
GELU MLP of 4 D, batch, sequence, steps, learning rate, dropout. Not told there
and chosen here: heads of 64, tied embeddings, rotary positions, clipping at
1.0. The paper reads RedPajama with the GPT-NeoX tokenizer: give its file as
`--config.data.tokenizer=tokenizer.json`; by default a BPE of that size is
trained on the corpus.
Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=12,
      model_dim=1024,
      num_heads=16,
      num_kv_heads=16,
      head_dim=64,
      mlp_dim=4096,
      mlp='gelu',
      vocab_size=50_304,
      dropout_rate=0.1,
      dtype='bfloat16',
      use_remat=True,
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=2048, batch_size=2048
    ),
    optimizer=c.OptimizerConfig(learning_rate=6e-4, warmup_steps=2384),
    train=c.TrainConfig(
      num_steps=238_418, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
