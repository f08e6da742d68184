"""MoE 2in33, the mixture beside Dense-680M in the UltraMem paper.

  python train.py --config=configs/moe_680m.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: MoE-2in33 of arXiv:2411.12364, Table 1: 8.95B parameters without
embeddings, 1.50 GFLOPs per token. Two of 33 experts of two matrices; their
width 3584 is inverted from the parameters. Batch, sequence, steps, learning
rate and dropout are those of the paper's dense models. Not told there and
chosen here: a softmax router, balance loss 0.01 and z-loss 1e-3. The 33 experts
are split over `mesh.sparse`, which must divide them.
Hardware: an accelerator pod; traced for 64 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=24,
      model_dim=1536,
      num_heads=12,
      num_kv_heads=12,
      head_dim=128,
      mlp_dim=3584,
      mlp='gelu',
      vocab_size=50_304,
      dropout_rate=0.1,
      dtype='bfloat16',
      use_remat=True,
      moe=c.MoEConfig(num_experts=33, num_used=2, expert_dim=3584),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=2048, batch_size=2048
    ),
    optimizer=c.OptimizerConfig(learning_rate=2.5e-4, warmup_steps=2384),
    train=c.TrainConfig(
      num_steps=238_418, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
