"""Which architecture holds more facts than a dense model can: 4,000 people.

  python -m jaxsparse.compare --suite=configs/compare/facts_24000.py \\
    --workdir=runs/facts_24000

The models and the text of `facts.py`, with more people and each fact told twice
as often, 96 times: after 48 what they have learned is the limit, not what they
could hold. A run takes 6 to 14 minutes of one core; two processes may share the
workdir with --only.

TABLE
"""

import dataclasses
import pathlib
import runpy

from jaxsparse.compare.suite import Suite

LEARNING_RATES = dict(
  dense=1e-2,
  moe=2.5e-3,
  pkm=5e-3,
  peer=1e-2,
  memory_plus=1e-2,
  ultramem=5e-3,
  ultramem_v2=5e-3,
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
