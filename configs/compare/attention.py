"""Composed heads against plain ones at equal FLOPs: bytes, minutes a run.

  python -m jaxsparse.compare --suite=configs/compare/attention.py \\
    --workdir=runs/compare_attention --text='books/*.txt'

Without --text on Python's own sources. All have QK-norm and the windows of
`dcformer_tiny`. The control's MLP is wider by what composition costs, so that
it has the most parameters of them.
"""

from jaxsparse import config as c
from jaxsparse.attention_config import query_wise_dcmha
from jaxsparse.compare.suite import Architecture, Suite


def get_suite() -> Suite:
  base = c.Config(
    model=c.ModelConfig(
      num_layers=2,
      model_dim=96,
      num_heads=8,
      num_kv_heads=8,
      head_dim=12,
      mlp_dim=328,
      # 256 bytes and the boundary.
      vocab_size=257,
      use_qk_norm=True,
      attention_pattern=('local', 'global'),
      window=32,
    ),
    data=c.DataConfig(tokenizer='bytes', seq_len=128, batch_size=16),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    train=c.TrainConfig(num_steps=500, log_every=10, save_every=250),
  )

  def composed(dcmha: c.DCMHAConfig) -> Architecture:
    return Architecture(model=dict(dcmha=dcmha))

  return Suite(
    base=base,
    architectures=dict(
      control=Architecture(),
      talking_heads=composed(
        c.DCMHAConfig(query_wise=False, key_wise=False, base=True)
      ),
      query_wise=composed(query_wise_dcmha()),
      dcmha=composed(c.DCMHAConfig()),
    ),
  )
