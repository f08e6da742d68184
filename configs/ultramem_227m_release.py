"""UltraMem 227M/1.2B of the official release, on 5.0e11 tokens.

  python train.py --config=configs/ultramem_227m_release.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: the UltraMem (V1) row of the open 227M/1.2B family in
arXiv:2508.18756, Table 10: 1.18B parameters without embeddings; the released
settings give 1.193B (here too), 1,002.8M of them values. Differs from the
paper's family in SwiGLU (gate and up 5,504 wide together), keys of full width
for every rank, fixed initial scales, no auxiliary loss, no dropout, weight
decay on values, and a value learning rate that falls from 4x. The release
decays norms and cores too; here only matrices and values. It reads the OLMoE
mix with the GPT-NeoX tokenizer: give its file as
`--config.data.tokenizer=tokenizer.json`; by default a BPE of that size is
trained on the corpus. Its batch of 768 divides over at most 256 x 3 devices;
its tables' 808 ** 2 rows over at most 64 of the `data` axis.
Hardware: an accelerator pod; traced for 4,096 devices (with 1,024 sequences a
step), not yet trained by us.
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
      mlp_dim=2752,
      mlp='swiglu',
      vocab_size=50_304,
      dtype='bfloat16',
      use_remat=True,
      memory=c.MemoryConfig(
        num_keys=808,
        key_dim=192,
        num_heads=2,
        num_selected=80,
        value_dim=384,
        expansion=4,
        tucker_rank=2,
        num_cores=2,
        split_key_dim=False,
        aux_loss_weight=0.0,
        init='release',
        placements=((2, 5), (6, 9), (10, 13), (14, 17)),
      ),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=4096, batch_size=768
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=4e-4,
      warmup_steps=3179,
      value_lr_multiplier=4.0,
      value_weight_decay=0.1,
    ),
    train=c.TrainConfig(
      num_steps=158_946, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
