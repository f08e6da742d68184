"""How many facts each architecture holds: generated biographies, two CPU cores.

  python -m jaxsparse.compare --suite=configs/compare/facts.py \\
    --workdir=runs/facts

Names of two tokens and six attributes of one token, 31.6 bits a person
(`jaxsparse.data.facts`). The dense model has 2 blocks of width 32; the sparse
ones have its FLOPs per token and ten times its parameters. All runs last until
a fact was told 48 times: as many steps for any number of people would compare
how fast a model learns, for with more people it sees each of them less often.
Settings by single runs of another seed or size, not searched further:
- Learning rates, with 1,000 people: dense 1e-2 (2.5e-3, 5e-3, 1e-2, 2e-2 gave
  12, 17, 19, 28 % of the facts after 32 exposures; but at 2e-2 a dense model of
  500 people fell from 41 to 31 %, MoE from 65 to 24 %). UltraMem 5e-3 (85 %; 47
  at 1e-2). With 2,000 people that is too high: 24 %, and 48 % at 2e-3. So the
  sparse ones' rate wants to be searched for each number of people; it is not.
- 64 values a token. Of 16 UltraMem learned half as much in the same time. One
  exposure leaves the more behind, the more values it may change.
- The values learn at the model's rate: 4 times it needed 1,500 steps for what
  once it took 1,200, and row_adagrad learned half as much.
- Many small steps, of 512 tokens.
- Not adopted yet, as only a few runs have it: b2 = 0.99 and as many phrasings
  as exposures, such that no text is read twice. After 48 exposures, of 500 and
  1,000 people: dense at 1e-2 73 and 43 %, UltraMem at 1e-2 92 and 41, at 5e-3
  61 and 81. So the best rate of UltraMem falls as the number of people grows,
  that of dense does not.
Two processes may share a workdir with --only; the command without it puts all
together.
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

WIDTH = 32
# The last block, whose attention has put name and attribute together.
LAST = ((1, 1),)


def get_suite() -> Suite:
  base = c.Config(
    model=c.ModelConfig(
      num_layers=2,
      model_dim=WIDTH,
      num_heads=4,
      num_kv_heads=4,
      head_dim=8,
      mlp_dim=96,
      vocab_size=facts.VOCAB_SIZE,
    ),
    data=c.DataConfig(seq_len=64, batch_size=8),
    optimizer=c.OptimizerConfig(
      learning_rate=1e-2, warmup_steps=100, weight_decay=0.0
    ),
    train=c.TrainConfig(log_every=50, save_every=1000),
  )
  # A start, from which the budget derives the number of keys.
  keys = dict(num_keys=64, key_dim=8)
  small = dict(num_heads=2, num_selected=32, **keys)
  slower = dict(learning_rate=5e-3)
  return Suite(
    base=base,
    total_parameters=266_000,
    people=(500, 1000, 2000),
    exposures=48,
    architectures=dict(
      dense=Architecture(),
      moe=Architecture(moe=c.MoEConfig(num_experts=32, num_used=2)),
      pkm=Architecture(
        memory=pkm(value_dim=WIDTH, placements=LAST, **small),
        optimizer=slower,
      ),
      peer=Architecture(
        memory=peer(
          value_dim=WIDTH, pre_value_dim=WIDTH, placements=LAST, **small
        ),
        optimizer=slower,
      ),
      memory_plus=Architecture(
        memory=memory_plus(
          value_dim=WIDTH, shared_rows=64**2, placements=LAST, **small
        ),
        optimizer=slower,
      ),
      ultramem=Architecture(
        memory=ultramem(
          value_dim=WIDTH,
          expansion=1,
          num_cores=1,
          placements=LAST,
          **small,
        ),
        optimizer=slower,
      ),
      ultramem_v2=Architecture(
        memory=ultramem_v2(
          # In each of two layers.
          num_selected=32,
          value_dim=WIDTH // 2,
          pre_value_dim=WIDTH // 2,
          expansion=1,
          num_cores=1,
          # Each of the two layers sees half of the rows.
          shared_rows=2 * 64**2,
          placements=((0, 0), (1, 1)),
          **keys,
        ),
        optimizer=slower,
      ),
    ),
  )
