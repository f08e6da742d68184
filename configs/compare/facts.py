"""How many facts each architecture holds: generated biographies, two CPU cores.

  python -m jaxsparse.compare --suite=configs/compare/facts.py \\
    --workdir=runs/facts

Names of two tokens and six attributes of one token, 31.6 bits a person
(`jaxsparse.data.facts`). The dense model has 2 blocks of width 64; the sparse
ones have its FLOPs per token and ten times its parameters. All take 3,000
steps, in which a fact is seen 130, 32, 16 or 8 times: with 1,000 people the
dense model learned 69 % of the facts (4,131), with 2,000 only 12 % (1,463),
UltraMem 47 % (5,663). Settings by such single runs, not searched further:
- 64 values a token. After 1,800 steps with 2,000 people UltraMem knew 25.6 % of
  the facts; with 16 values 11.5 %, dense 7.6 %. One exposure leaves the more
  behind, the more values it may change.
- The values learn at the model's rate: 4 times it needed 1,500 steps for what
  once it took 1,200, and row_adagrad learned half as much.
- Many small steps, of 512 tokens.
A run takes 1.5 minutes (dense) to 4.5 on one core, all 84 about 5.5 hours. Two
may share a workdir with --only; the command without it puts all together.
"""

from jaxsparse import config as c
from jaxsparse.compare.suite import Architecture, Suite
from jaxsparse.data import facts
from jaxsparse.memory_config import (
  memory_plus,
  peer,
  pkm,
  ultramem,
  ultramem_v2,
)

WIDTH = 64
# The last block, whose attention has put name and attribute together.
LAST = ((1, 1),)


def get_suite() -> Suite:
  base = c.Config(
    model=c.ModelConfig(
      num_layers=2,
      model_dim=WIDTH,
      num_heads=4,
      num_kv_heads=4,
      head_dim=16,
      mlp_dim=128,
      vocab_size=facts.VOCAB_SIZE,
    ),
    data=c.DataConfig(seq_len=64, batch_size=8),
    optimizer=c.OptimizerConfig(
      learning_rate=5e-3, warmup_steps=100, weight_decay=0.0
    ),
    train=c.TrainConfig(num_steps=3000, log_every=50, save_every=1000),
  )
  small = dict(key_dim=16, num_heads=2, num_selected=32)
  return Suite(
    base=base,
    total_parameters=820_000,
    people=(250, 1000, 2000, 4000),
    architectures=dict(
      dense=Architecture(),
      moe=Architecture(moe=c.MoEConfig(num_experts=32, num_used=2)),
      pkm=Architecture(memory=pkm(value_dim=WIDTH, placements=LAST, **small)),
      peer=Architecture(
        memory=peer(
          value_dim=WIDTH, pre_value_dim=WIDTH, placements=LAST, **small
        )
      ),
      memory_plus=Architecture(
        memory=memory_plus(
          value_dim=WIDTH, shared_rows=128**2, placements=LAST, **small
        )
      ),
      ultramem=Architecture(
        memory=ultramem(
          value_dim=WIDTH,
          expansion=1,
          num_cores=1,
          placements=LAST,
          **small,
        )
      ),
      ultramem_v2=Architecture(
        memory=ultramem_v2(
          key_dim=16,
          # In each of two layers.
          num_selected=32,
          value_dim=WIDTH // 2,
          pre_value_dim=WIDTH // 2,
          expansion=1,
          num_cores=1,
          # Each of the two layers sees half of the rows.
          shared_rows=2 * 128**2,
          placements=((0, 0), (1, 1)),
        )
      ),
    ),
  )
