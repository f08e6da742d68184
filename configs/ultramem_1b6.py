"""UltraMem-1.6B-x12 of the UltraMem paper, on 1.0e12 tokens.

  python train.py --config=configs/ultramem_1b6.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: UltraMem-1.6B-x12 of arXiv:2411.12364, Table 1: 21.41B parameters
without embeddings (here 21.391B, 19.642B of them values), 3.50 GFLOPs per
token (here 3.499). The backbone and what was chosen for it are those of
`dense_1b6`; two heads of 42 slots, expansion 4, rank 2, two cores and the
auxiliary loss are the paper's; its query convolution is taken to have 5 taps.
`num_keys` and `key_dim` are inverted from the published total and FLOPs, as
the paper's size table could not be read; 1,788 keys are 0.09 % below 21.41B.
No multiple of 8 comes within 0.1 %: 1,788 ** 2 rows divide over up to 16
devices of the `data` axis, so give larger meshes to the other axes. The
paper's pairs 3:7, ..., 28:32 are counted from 1: 32 is the last block.
Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
Result: none measured.
"""

from jaxsparse import config as c


def get_config() -> c.Config:
  return c.Config(
    model=c.ModelConfig(
      num_layers=32,
      model_dim=2048,
      num_heads=16,
      num_kv_heads=16,
      head_dim=128,
      mlp_dim=8192,
      mlp='gelu',
      vocab_size=50_304,
      dropout_rate=0.1,
      dtype='bfloat16',
      use_remat=True,
      memory=c.MemoryConfig(
        num_keys=1788,
        key_dim=800,
        num_heads=2,
        num_selected=42,
        value_dim=1024,
        expansion=4,
        tucker_rank=2,
        num_cores=2,
        split_key_dim=True,
        query_conv_taps=5,
        aux_loss_weight=1e-3,
        aux_loss_margin=0.15,
        placements=((2, 6), (7, 11), (12, 16), (17, 21), (22, 26), (27, 31)),
      ),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=2048, batch_size=2048
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=2e-4,
      warmup_steps=2384,
      value_lr_multiplier=10.0,
      value_weight_decay=0.1,
    ),
    train=c.TrainConfig(
      num_steps=238_418, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
