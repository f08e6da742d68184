"""PKM-151M-x10, the product-key memory from which UltraMem's ablation starts.

  python train.py --config=configs/pkm_151m.py \\
    --config.data.tfds=lm1b --workdir=gs://...

Reproduces: the first row of arXiv:2411.12364, Table 2: 173.01M dense and 1.534B
sparse parameters, 346.06 MFLOPs per token. One layer of 1,224 ** 2 values of
the model's width beside the MLP of block 5. Head count times key width is 4,896
by the paper's sizes, and two heads by the effect of sharing their query; the 42
slots of a head are UltraMem's. Batch, sequence, steps, learning rate and
dropout are those of the paper's dense models; values have a constant rate of
1e-3 (arXiv:1907.05242).
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
      memory=c.MemoryConfig.pkm(
        num_keys=1224,
        key_dim=2448,
        num_heads=2,
        num_selected=42,
        value_dim=1024,
        query_bias=False,
        placements=((5, 5),),
      ),
    ),
    data=c.DataConfig(
      tokenizer='bpe', bpe_vocab_size=50_277, seq_len=2048, batch_size=2048
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=6e-4, warmup_steps=2384, value_learning_rate=1e-3
    ),
    train=c.TrainConfig(
      num_steps=238_418, save_every=1000, eval_every=5000, sample_prompt='The '
    ),
  )
