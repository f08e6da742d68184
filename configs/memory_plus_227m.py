"""Memory+ 227M/1.2B, as the official UltraMem release has it.

  python train.py --config=configs/memory_plus_227m.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: the Memory+ row of the open 227M/1.2B family in arXiv:2508.18756,
Table 10: 1.19B parameters without embeddings (1.197B here), 994.6M of them
values. Four layers of one table beside the MLPs, 2 heads of 80 slots, raw keys,
no query bias; values at a constant rate of 1e-3 (arXiv:2412.09764). The family
reads 768 sequences of 4,096 tokens a step and 5e11 tokens of the OLMoE mix with
the GPT-NeoX tokenizer. Memory+ as its authors describe it replaces the MLP
(replaces_mlp) and normalises keys (key_norm='rms').
Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=20,
      model_dim=768,
      num_heads=12,
      num_kv_heads=12,
      head_dim=64,
      mlp_dim=3008,
      mlp='swiglu',
      vocab_size=50_304,
      dtype='bfloat16',
      use_remat=True,
      memory=c.MemoryConfig.memory_plus(
        num_keys=1138,
        key_dim=384,
        num_heads=2,
        num_selected=80,
        value_dim=768,
        shared_rows=1138**2,
        query_bias=False,
        key_norm='none',
        replaces_mlp=False,
        placements=((4, 4), (8, 8), (12, 12), (16, 16)),
      ),
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
