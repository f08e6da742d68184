"""UltraMemV2 1B/7B: the larger open UltraMemV2.

  python train.py --config=configs/ultramem_v2_1b.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: UltraMemV2-1B/7B of arXiv:2508.18756: 6.70B parameters without
embeddings, 1.079B active. From the paper: width, blocks, heads, key width 512,
128 slots, values of 768 and pre-values of 384. Its 528 keys per axis give 1.5B
values too few for its total; 552 give the total. The MLP's width follows from
the active parameters; that each layer sees half of the rows is chosen as in the
227M model, whose settings it shares otherwise. Batch 1,024 x 4,096.
Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=16,
      model_dim=2048,
      num_heads=16,
      num_kv_heads=16,
      head_dim=128,
      mlp_dim=6656,
      mlp='swiglu',
      vocab_size=50_304,
      dtype='bfloat16',
      use_remat=True,
      memory=c.MemoryConfig.ultramem_v2(
        num_keys=1561,
        key_dim=512,
        num_selected=128,
        value_dim=768,
        pre_value_dim=384,
        expansion=1,
        shared_rows=16 * 552**2,
        placements=tuple((i, i) for i in range(16)),
      ),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=4096, batch_size=1024
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=4e-4, warmup_steps=2384, value_weight_decay=0.1
    ),
    train=c.TrainConfig(
      num_steps=119_209, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
