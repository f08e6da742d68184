# SPDX-License-Identifier: Apache-2.0
"""A trained model goes on with new text, and keeps the old one in mind.

  python train.py --config=configs/ultramem.py:tiny --workdir=runs/first
  python train.py --config=configs/continued.py:rewarmed \\
    --config.train.start_from=runs/first --config.data.text='new/*.txt' \\
    --config.data.replay='old/*.txt' --workdir=runs/second

All go on from `ultramem:tiny`, whose model they have; for another model, leave
--config out and set the same fields. --config.data.replay mixes 5 % of old rows
in, enough for text of the same language; other languages take 25 %.

rewarmed
  Reproduces: the re-warming, re-decaying and replay of arXiv:2403.08763: a
  cosine of its own from 0.4 of the former peak; the whole peak pays off only
  for much new text, as the warm-up itself forgets.
  Hardware: two CPU cores, minutes.
  Result: --config.train.num_steps=100 on enwik8's first 1,000,000 bytes, from
  a run on Python's text: bits per byte of new text fall from 4.402 to 3.274, of
  old text rise from 1.951 to 2.430. Without replay 3.270 and 2.891. One seed;
  docs/guides/continue.md has the commands. All 300 steps were not run.

infinite
  Reproduces: the infinite schedule of arXiv:2403.08763, Section 5.3, also in
  arXiv:2503.02844: warm-up, cool-down to half of the peak, and a constant rate
  at which the next text can be taken up. More train.num_steps go on exactly.
  Hardware: two CPU cores, minutes.
  Result: 120 steps of the same text, of which the cool-down takes 100: new text
  4.402 to 3.239, old text 1.951 to 2.483.

annealed
  Reproduces: the last phase of that schedule (arXiv:2403.08763), to publish
  what `infinite` has made: --config.train.start_from=runs/second, from the
  constant rate down to a fifth of it. The next text goes on from before it.
  Hardware: two CPU cores, minutes.
  Result: --config.train.num_steps=40 --config.optimizer.anneal_steps=40 after
  `infinite`: new text 3.239 to 3.162, old text 2.483 to 2.462.
"""

import dataclasses

from jaxsparse import config as c
from jaxsparse.run import recipe_files

# Of `ultramem:tiny`.
PEAK = 3e-3

SIZES = {
  'rewarmed': dict(learning_rate=0.4 * PEAK, warmup_steps=10),
  'infinite': dict(
    schedule='infinite',
    learning_rate=0.4 * PEAK,
    warmup_steps=10,
    cooldown_steps=100,
    constant_lr_fraction=0.5,
  ),
  'annealed': dict(
    schedule='infinite',
    learning_rate=0.2 * PEAK,
    warmup_steps=0,
    anneal_steps=100,
    final_lr_fraction=0.2,
  ),
}


def get_config(size: str) -> c.Config:
  base = recipe_files.shipped('ultramem:tiny')
  fields = SIZES[size]
  return dataclasses.replace(
    base,
    # The values' rate is ten times the model's for a fresh table alone.
    optimizer=c.OptimizerConfig(**fields),
    train=c.TrainConfig(num_steps=fields.get('anneal_steps', 300)),
  )
