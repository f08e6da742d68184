"""Which architecture holds more facts than a dense model can: 4,000 people.

  python -m jaxsparse.compare --suite=configs/compare/facts_24000.py \\
    --workdir=runs/facts_24000

The models of `facts.py`, with more people, and each fact told 96 times, each
time in other words: after 48 times what models have learned is the limit, not
what they could hold. A run takes 7 to 14 minutes of a core (JAX 0.10.2, two
runs at once); two processes may share the workdir with --only.

Result (results/compare_facts_24000.json, of seed 0, and of seed 1 for dense and
PKM), recalled of 24,000 facts and times what dense recalls on the mean:

  dense        18, 21 %            MoE         56 %  2.9x
  PEER         75 %      3.8x      UltraMem    53 %  2.7x
  Memory+      66 %      3.4x      UltraMemV2  50 %  2.6x
  PKM          52, 79 %  3.3x

- One seed may recall 1.5 times as much as another (PKM), so the order is no
  finding yet, but that all recall more than twice as much as dense is.
- With more people and more exposures lower rates are better than in `facts.py`.
  Seed 0: MoE 46 % at 5e-3 (36 with b2 0.95), PEER 47 at 1e-2, UltraMemV2 25 at
  1e-2 and 37 at 5e-3. Lower ones than those below were not tried.
- With 48 phrasings, each told twice, dense recalls 17 %, UltraMem 53 at 5e-3,
  Memory+ 61 at 1e-2 (results/facts_96_exposures.json).
"""

import dataclasses
import pathlib
import runpy

from jaxsparse.compare.suite import Suite

LEARNING_RATES = dict(
  dense=1e-2,
  moe=2.5e-3,
  pkm=5e-3,
  peer=5e-3,
  memory_plus=5e-3,
  ultramem=2.5e-3,
  ultramem_v2=2.5e-3,
)


def get_suite() -> Suite:
  facts = pathlib.Path(__file__).with_name('facts.py')
  suite = runpy.run_path(str(facts))['get_suite']()
  architectures = {
    name: dataclasses.replace(
      architecture,
      optimizer=dict(learning_rate=LEARNING_RATES[name], b2=0.99),
      rate_times_people=0.0,
    )
    for name, architecture in suite.architectures.items()
  }
  return dataclasses.replace(
    suite,
    architectures=architectures,
    people=(4000,),
    exposures=96,
    num_phrasings=96,
  )
