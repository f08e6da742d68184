# SPDX-License-Identifier: Apache-2.0
"""UltraMemV2 (arXiv:2508.18756): a memory layer in every block.

  python train.py --config=configs/ultramem_v2.py:tiny \\
    --workdir=runs/ultramem_v2_tiny
  python train.py --config=configs/ultramem_v2.py:227m \\
    --config.data.tfds=lm1b --workdir=gs://...

tiny
  Reproduces: our own comparison at this size, see `dense:tiny`, whose FLOPs per
  token it has to 1 %, and whose text, steps and rates. Four layers see half
  each of 16,384 values and pre-values; 1.88M parameters.
  Hardware: two CPU cores.
  Result: see results/compare_cpu.json.

227m
  Reproduces: the UltraMemV2 row of the open 227M/1.2B family in
  arXiv:2508.18756, Table 10: 1.18B parameters without embeddings (1.193B here,
  with the paper's query for each rank), 995.3M of them values and pre-values:
  20 x 360 ** 2 rows, of which each layer sees a window of 1,138 ** 2. The
  family reads 768 sequences of 4,096 tokens a step and 5e11 tokens of the OLMoE
  mix with the GPT-NeoX tokenizer. Values learn at the model's rate.
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.

1b
  Reproduces: UltraMemV2-1B/7B of arXiv:2508.18756, the larger open one: 6.70B
  parameters without embeddings, 1.079B active. From the paper: width, blocks,
  heads, key width 512, 128 slots, values of 768 and pre-values of 384. Its 528
  keys per axis give 1.5B values too few for its total; 552 give the total. The
  MLP's width follows from the active parameters; that each layer sees half of
  the rows is chosen as in the 227M model, whose settings it shares otherwise.
  Batch 1,024 x 4,096.
  Hardware: an accelerator pod; traced for 4,096 devices, not yet trained by us.
  Result: none measured.
"""

from jaxsparse import config as c

# Sizes of the model, and of its memory layers.
SIZES = {
  'tiny': (
    dict(num_layers=4, model_dim=128, num_heads=4, mlp_dim=252),
    dict(
      num_keys=90,
      key_dim=32,
      num_selected=16,
      value_dim=32,
      pre_value_dim=32,
      shared_rows=4 * 64**2,
    ),
  ),
  '227m': (
    dict(num_layers=20, model_dim=768, num_heads=12, mlp_dim=2496),
    dict(
      num_keys=1138,
      key_dim=192,
      num_selected=32,
      value_dim=192,
      pre_value_dim=192,
      shared_rows=20 * 360**2,
    ),
  ),
  '1b': (
    dict(num_layers=16, model_dim=2048, num_heads=16, mlp_dim=6656),
    dict(
      num_keys=1561,
      key_dim=512,
      num_selected=128,
      value_dim=768,
      pre_value_dim=384,
      shared_rows=16 * 552**2,
    ),
  ),
}
# Sequences a step, steps of warm-up, steps.
TRAINING = {'227m': (768, 3179, 158_946), '1b': (1024, 2384, 119_209)}


def get_config(size: str) -> c.Config:
  sizes, memory = SIZES[size]
  num_heads = sizes['num_heads']
  model = dict(
    num_kv_heads=num_heads,
    head_dim=sizes['model_dim'] // num_heads,
    mlp='swiglu',
    memory=c.MemoryConfig.ultramem_v2(
      expansion=1,
      placements=tuple((i, i) for i in range(sizes['num_layers'])),
      **memory,
    ),
    **sizes,
  )
  if size == 'tiny':
    return c.Config(
      model=c.ModelConfig(**model),
      data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
      optimizer=c.OptimizerConfig(
        learning_rate=3e-3, warmup_steps=50, value_lr_multiplier=10.0
      ),
      train=c.TrainConfig(num_steps=600),
    )
  batch_size, warmup_steps, num_steps = TRAINING[size]
  return c.Config(
    model=c.ModelConfig(
      vocab_size=50_304, dtype='bfloat16', use_remat=True, **model
    ),
    data=c.DataConfig(
      tokenizer='bpe',
      bpe_vocab_size=50_277,
      seq_len=4096,
      batch_size=batch_size,
    ),
    optimizer=c.OptimizerConfig(
      learning_rate=4e-4, warmup_steps=warmup_steps, value_weight_decay=0.1
    ),
    train=c.TrainConfig(
      num_steps=num_steps,
      save_every=1000,
      eval_every=5000,
      sample_prompt='The ',
    ),
  )
