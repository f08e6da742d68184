# SPDX-License-Identifier: Apache-2.0
"""How many facts each architecture holds: generated biographies, two CPU cores.

  python -m jaxsparse compare --suite=configs/compare/facts.py \\
    --workdir=runs/facts

Names of two tokens and six attributes of one token, 31.6 bits a person
(`jaxsparse.data.facts`). The dense model has 2 blocks of width 32; the sparse
ones have its FLOPs per token and ten times its parameters. All runs last until
a fact was stated 48 times, each time in other words: as many steps for any
number of people would compare how fast a model learns, for with more people it
sees each of them less often. Settings are those that recalled most in single
runs of seed 0, on the facts of 1,000 people where no other number is given;
each run is one cell:

  learning rate  2.5e-3  5e-3          1e-2           2e-2
  dense                  37 (500: 59)  43 (500: 74)   42 (500: 58)
  MoE, b2 0.95           84            76 (500: 81)
  MoE, b2 0.99           66 (500: 96)  58 (500: 94)
  PKM, b2 0.95           52 (500: 61)  31
  PKM, b2 0.99   47      43 (500: 71)  (500: 43)
  PEER           34      56            71 (500: 82)
  Memory+                97            (500: 88)
  UltraMem               81 (500: 61)  41 (500: 92)
  UltraMemV2     27      33            93 (500: 59)   (500: 29)

- So UltraMem's best rate falls as the number of people grows, and Memory+ and
  MoE follow it; PEER and UltraMemV2 keep the dense model's.
- Memory+ should not, with 2,000 people (12,000 facts): there it recalls 44, 53,
  65 and 26 % at 2.5e-3, 5e-3, 1e-2 and 2e-2, UltraMemV2 67 % at 1e-2, and dense
  23, 25 and 19 % at 5e-3, 1e-2 and 2e-2. That is 2.6 and 2.7 times as many
  facts. With 4,000 Memory+ recalls 25 % at 1e-2, fewer facts than with 2,000.
- With 2,000 people and 96 exposures, of 48 phrasings, dense recalls 47 % at
  1e-2, UltraMem 89 at 5e-3 and Memory+ 99 at 1e-2, all with b2 0.99
  (results/facts_96_exposures.json; single runs, seed 0). So 48 hid what the
  tables can hold: `facts_24000.py`.
- With 500 people MoE and PKM recalled more with b2 0.99: 3,000 facts are too
  few to judge these two by.
- 64 values a token. Of 16 UltraMem learned half as much in the same time. One
  exposure leaves the more behind, the more values it may change.
- The values learn at the model's rate: 4 times it needed 1,500 steps for what
  once it took 1,200, and row_adagrad learned half as much.
- Many small steps, of 512 tokens.
Result (results/compare_facts.json; three seeds, least to greatest): of 6,000
facts dense recalls 43 to 54 %, Memory+ 96 to 99, MoE 84 to 96, UltraMem 81 to
92, PEER 71 to 82, UltraMemV2 40 to 93, PKM 52 to 76. As dense holds 2,584 to
3,221, three times as many can't be seen below 10,000 facts. Its parameters hold
0.34 to 0.41 bits each, where 1 is known to fit after 100 exposures and 2 after
1,000 (arXiv:2404.05405): 48 limit all models by what they learn, not by what
they could hold.
Two processes may share a workdir with --only; the command without it puts all
together.
"""

from jaxsparse import config as c
from jaxsparse.data import facts
from jaxsparse.experiments.compare.suite import Architecture, Suite

WIDTH = 32
# The last block, whose attention has put name and attribute together.
LAST = ((1, 1),)
LR_PER_PERSON = 5.0


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
      learning_rate=1e-2, b2=0.99, warmup_steps=100, weight_decay=0.0
    ),
    train=c.TrainConfig(log_every=50, save_every=1000),
  )
  # A start, from which the budget derives the number of keys.
  keys = dict(num_keys=64, key_dim=8)
  small = dict(num_heads=2, num_selected=32, **keys)
  return Suite(
    base=base,
    total_parameters=266_000,
    people=(500, 1000),
    exposures=48,
    # As many as exposures: no text is read twice.
    num_phrasings=48,
    architectures=dict(
      dense=Architecture(),
      moe=Architecture(
        moe=c.MoEConfig(num_experts=32, num_experts_per_token=2),
        optimizer=dict(b2=0.95),
        lr_per_person=LR_PER_PERSON,
      ),
      pkm=Architecture(
        memory=c.MemoryConfig.pkm(value_dim=WIDTH, placements=LAST, **small),
        optimizer=dict(learning_rate=5e-3, b2=0.95),
      ),
      peer=Architecture(
        memory=c.MemoryConfig.peer(
          value_dim=WIDTH, pre_value_dim=WIDTH, placements=LAST, **small
        ),
      ),
      memory_plus=Architecture(
        memory=c.MemoryConfig.memory_plus(
          value_dim=WIDTH, shared_rows=64**2, placements=LAST, **small
        ),
        lr_per_person=LR_PER_PERSON,
      ),
      ultramem=Architecture(
        memory=c.MemoryConfig.ultramem(
          value_dim=WIDTH,
          expansion=1,
          num_cores=1,
          placements=LAST,
          **small,
        ),
        lr_per_person=LR_PER_PERSON,
      ),
      ultramem_v2=Architecture(
        memory=c.MemoryConfig.ultramem_v2(
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
      ),
    ),
  )
