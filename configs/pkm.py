# SPDX-License-Identifier: Apache-2.0
"""Product-key memory (arXiv:1907.05242): UltraMem's starting point, and tiny.

  python train.py --config=configs/pkm.py:tiny --workdir=runs/pkm_tiny
  python train.py --config=configs/pkm.py:151m \\
    --config.data.tfds=lm1b --workdir=gs://...

tiny
  Reproduces: our own comparison at this size, see `dense:tiny`, whose FLOPs per
  token it has to 1 %, and whose text, steps and rates. 8,100 values of the
  model's width beside the MLP of block 1; 1.87M parameters.
  Hardware: two CPU cores.
  Result: see results/compare_cpu.json.

151m
  Reproduces: PKM-151M-x10, from which UltraMem's ablation starts, the first row
  of arXiv:2411.12364, Table 2: 173.01M dense and 1.534B sparse parameters,
  346.06 MFLOPs per token. One layer of 1,224 ** 2 values of the model's width
  beside the MLP of block 5. Head count times key width is 4,896 by the paper's
  sizes, and two heads by the effect of sharing their query; the 42 slots of a
  head are UltraMem's. Batch, sequence, steps, learning rate and dropout are
  those of the paper's dense models; values have a constant rate of 1e-3
  (arXiv:1907.05242).
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Sizes of the model, and of its memory layer.
SIZES = {
  'tiny': (
    dict(num_layers=4, model_dim=128, num_heads=4, mlp_dim=332),
    dict(num_keys=90, key_dim=32, num_selected=16, placements=((1, 1),)),
  ),
  '151m': (
    dict(num_layers=12, model_dim=1024, num_heads=16, mlp_dim=4096),
    dict(num_keys=1224, key_dim=2448, num_selected=42, placements=((5, 5),)),
  ),
}


def get_config(size: str) -> c.Config:
  sizes, memory = SIZES[size]
  model_dim, num_heads = sizes['model_dim'], sizes['num_heads']
  shape = dict(num_kv_heads=num_heads, head_dim=model_dim // num_heads, **sizes)
  memory = dict(num_heads=2, value_dim=model_dim, **memory)
  if size == 'tiny':
    return c.Config(
      model=c.ModelConfig(
        mlp='swiglu', memory=c.MemoryConfig.pkm(**memory), **shape
      ),
      data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
      optimizer=c.OptimizerConfig(
        learning_rate=3e-3, warmup_steps=50, value_lr_multiplier=10.0
      ),
      train=c.TrainConfig(num_steps=600),
    )
  return c.Config(
    model=c.ModelConfig(
      mlp='gelu',
      vocab_size=50_304,
      dropout_rate=0.1,
      dtype='bfloat16',
      use_remat=True,
      memory=c.MemoryConfig.pkm(query_bias=False, **memory),
      **shape,
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
