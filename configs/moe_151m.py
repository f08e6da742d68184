"""MoE 2in32, the mixture beside Dense-151M in the UltraMem paper.

  python train.py --config=configs/moe_151m.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: MoE-2in32 of arXiv:2411.12364, Table 1: 2.04B parameters without
embeddings, 0.35 GFLOPs per token. Two of 32 experts of two matrices; their
width 2528 is inverted from the parameters. Batch, sequence, steps, learning
rate and dropout are those of the paper's dense models. Not told there and
chosen here: a softmax router, balance loss 0.01 and z-loss 1e-3. The 32 experts
are split over `mesh.sparse`, which must divide them.
Hardware: an accelerator pod; traced for 2,048 devices, not yet trained by us.
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
      mlp_dim=2528,
      mlp='gelu',
      vocab_size=50_304,
      dropout_rate=0.1,
      dtype='bfloat16',
      use_remat=True,
      moe=c.MoEConfig(num_experts=32, num_used=2, expert_dim=2528),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=2048, batch_size=2048
    ),
    optimizer=c.OptimizerConfig(learning_rate=6e-4, warmup_steps=2384),
    train=c.TrainConfig(
      num_steps=238_418, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
