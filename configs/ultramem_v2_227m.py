"""UltraMemV2 227M/1.2B: a memory layer in every block.

  python train.py --config=configs/ultramem_v2_227m.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: the UltraMemV2 row of the open 227M/1.2B family in arXiv:2508.18756,
Table 10: 1.18B parameters without embeddings (1.193B here, with the paper's
query for each rank), 995.3M of them values and pre-values: 20 x 360 ** 2 rows,
of which each layer sees a window of 1,138 ** 2. The family reads 768 sequences
of 4,096 tokens a step and 5e11 tokens of the OLMoE mix with the GPT-NeoX
tokenizer. Values learn at the model's rate.
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
      mlp_dim=2496,
      mlp='swiglu',
      vocab_size=50_304,
      dtype='bfloat16',
      use_remat=True,
      memory=c.MemoryConfig.ultramem_v2(
        num_keys=1138,
        key_dim=192,
        num_selected=32,
        value_dim=192,
        pre_value_dim=192,
        expansion=1,
        shared_rows=20 * 360**2,
        placements=tuple((i, i) for i in range(20)),
      ),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=4096, batch_size=768
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=4e-4, warmup_steps=3179, value_weight_decay=0.1
    ),
    train=c.TrainConfig(
      num_steps=158_946, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
