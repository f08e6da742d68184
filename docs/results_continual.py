# SPDX-License-Identifier: Apache-2.0
"""The page of results about new facts beside old ones."""

from results_tables import each, load, table

from jaxsparse.experiments.compare import continual_report

NAME = 'compare_continual'
NAMES = dict(
  full='all parameters', lora='LoRA, all matrices',
  lora_qv='LoRA, queries and values', rows_kl='2,000 rows by KL',
  rows_kl_4000='3,359 rows by KL, all of more reads', rows_tfidf='2,000 rows by tf-idf',
  rows_replay='2,000 rows by KL, half of the text old',
  lora_replay='LoRA, all matrices, half of the text old',
)  # fmt: skip


def methods():
  """Method -> its points, one for each rate."""
  found = load(NAME)
  points = {
    name: continual_report.points(found['runs'], name)
    for name in found['methods']
  }
  return {name: of for name, of in points.items() if of}


def fair(other, control, seed):
  """`control` at the rate of its most new facts, and `other` where it has them.

  Of the rates at which it has as many or more, the one that forgets least; None
  if there is none, or no run of `control`.
  """
  runs = [r for r in _runs() if r['seed'] == seed]
  lora, found = (continual_report.points(runs, n) for n in (control, other))
  if not lora:
    return None
  best = continual_report.best(lora)
  point = continual_report.least_forgotten(found, best.new.mean)
  return point and (point, best)


def _by_seed(name, rate, pick):
  """A figure of each seed in percent, a dash where there is none."""
  found = {r['seed']: pick(r) for r in _runs() if _cell(r) == (name, rate)}
  seeds, *_ = _before()
  return ', '.join(
    f'{100 * found[s]:.0f}' if s in found else '-' for s in seeds
  )


def _cell(run):
  return run['architecture'], run['rate']


def _runs():
  return [r for r in load(NAME)['runs'] if 'rate' in r]


def _rates():
  runs = _runs()
  picks = (
    lambda r: r['recall'],
    lambda r: r['old_recall'],
    continual_report.forgotten,
  )
  rows = []
  for name, points in methods().items():
    trained = next(r for r in runs if r['architecture'] == name)['num_trained']
    rows += [
      [
        NAMES[name] if i == 0 else '',
        f'{trained:,}' if i == 0 else '',
        f'{point.rate:g}',
        *(_by_seed(name, point.rate, pick) for pick in picks),
      ]
      for i, point in enumerate(points)
    ]
  heads = ['trained', 'parameters', 'rate', 'new facts, %', 'old facts, %']
  return table([*heads, 'forgotten, % of those before'], rows)


def _levels():
  levels = continual_report.LEVELS
  rows = []
  for name, points in methods().items():
    cells = []
    for level in levels:
      point = continual_report.least_forgotten(points, level)
      cells.append(
        f'{100 * point.forgotten.mean:.0f} % (rate {point.rate:g})'
        if point
        else 'not reached'
      )
    rows.append([NAMES[name], *cells])
  return table(
    ['trained', *(f'{level:.0%} of the new' for level in levels)], rows
  )


def _before():
  runs = _runs()
  by_seed = {r['seed']: r for r in runs}
  seeds = sorted(by_seed)
  old, new = (
    each([100 * by_seed[s][key] for s in seeds], '.0f')
    for key in ('old_recall_before', 'recall_before')
  )
  return seeds, old, new


def _against(control):
  """Rows of those whose text is mixed as that of the LoRA `control` is."""
  rows = []
  seeds, *_ = _before()
  for name in methods():
    if name.startswith('lora') or _is_mixed(name) != _is_mixed(control):
      continue
    for seed in seeds:
      pair = fair(name, control, seed)
      if pair is None:
        continue
      rows.append(
        [
          NAMES[name],
          seed,
          *(
            f'{100 * x.new.mean:.0f} %, {100 * x.forgotten.mean:.0f} % '
            f'(rate {x.rate:g})'
            for x in pair
          ),
          f'{pair[0].forgotten.mean / pair[1].forgotten.mean:.2f}',
        ]
      )
  heads = ['trained', 'seed', 'learned, forgotten', NAMES[control]]
  return table([*heads, 'forgotten, of what LoRA does'], rows)


def _is_mixed(name):
  return name.endswith('_replay')


def continual():
  seeds, old, new = _before()
  return f"""# New facts beside old ones

What a model forgets when it learns: Memory+ of `configs/compare/facts.py` (286,000 parameters, 7,616 rows of 32) knows the 6,000 facts of
1,000 people and learns 600 of 100 others, each told 24 times; names are made of the same parts. Seeds {each(seeds, 'd')}.

`python -m jaxsparse compare --suite=configs/compare/continual.py --workdir=...`; figures in `results/compare_continual.json`.

Before, the base recalls {old} % of the old facts and {new} % of the new ones, which is chance.

![New facts learned, and old ones kept](../../results/compare_continual.png)

## What is forgotten for as much as LoRA learns

LoRA at the rate at which it learns most, and the others at that of their rates which forgets least and learns as much or more. Forgotten is the
share of the old facts that the base had and the model has no more. Rates 0.004 and 0.005 of rows were added to come near what LoRA learns.

{_against('lora')}

LoRA changes what every token does, and forgets most before it learns much; of queries and values alone it learns next to nothing and forgets
as much. All parameters learn most, and forget nearly as much. Rows that learn just more than LoRA forget a fifth of what it does or less: 2,000
rows where LoRA learns little (0.09 and 0.10), and where it learns most only all rows that the new text reads more than the old one (0.19; 2,000
forget 0.27). They are read by old facts, too: of the reads by the new text and by the old one 2,000 rows by KL have 45 and 34 %, and the first
250 of them still 12 and 8 %, as the names of both are made of the same parts. So rows forget the more, the more they learn: nearly all new facts
cost half of the old ones.

The same with old text in half of each batch, for twice the steps:

{_against('lora_replay')}

LoRA then forgets half of the old facts and learns no more than 38 % of the new ones; at a rate of 0.005 it learns as much within a percent and
forgets 42 to 48 %. Rows learn 92 to 96 % and forget 11 to 16 %, 0.27 to 0.34 of that; at a lower rate they learn less and forget as much. Rows
without old text that learn more than this LoRA (44 to 50 %, at 0.006) forget 9 to 17 %, in half of the steps. Few rates, of one to
three seeds, which differ by up to three times in what LoRA learns: the order is a finding, the ratios are not.

## Least forgotten at a level

On the mean of the seeds that are there, which are not the same ones at all rates.

{_levels()}

## All rates

A figure for each seed, - where there is none.

{_rates()}
"""
