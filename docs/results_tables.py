# SPDX-License-Identifier: Apache-2.0
"""The pages of results, as tables of the figures in `results/*.json`."""

import itertools
import json
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
NAMES = dict(
  dense='dense', moe='MoE', pkm='PKM', peer='PEER', memory_plus='Memory+',
  ultramem='UltraMem', ultramem_v2='UltraMemV2', control='plain heads',
  wide='plain heads, a wider MLP', talking_heads='talking heads',
  query_wise='DCMHA, query-wise', dcmha='DCMHA', sparse='sparse',
  window='window only', indexer='sparse, learned indexer',
)  # fmt: skip
# What the paper's Table 2 reports for each step, nats/token.
_PUBLISHED = dict(
  no_softmax=-0.006, half_values=-0.022, shared_query=0.003,
  split_and_skip=-0.015, norms=0.001, expansion_4=-0.017,
  tucker_rank_2=-0.008, two_cores=-0.003, better_init=-0.003,
  value_rate=-0.022, query_conv=0.0,
)  # fmt: skip


def load(name):
  return json.loads((ROOT / 'results' / f'{name}.json').read_text())


def by_seed(name, key, people=0):
  """Architecture -> figures of a comparison, ordered by seed."""
  found = {}
  for run in sorted(load(name)['runs'], key=lambda run: run['seed']):
    if run['people'] == people:
      found.setdefault(run['architecture'], []).append(run[key])
  return found


def seconds(name):
  """(task, contender) -> seconds."""
  return {
    (r['task'], r['contender']): r['seconds'] for r in load(name)['results']
  }


def table(head, rows):
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in lines)


def span(values, form='.2f'):
  low, high = (format(f(values), form) for f in (min, max))
  return low if low == high else f'{low} to {high}'


def each(values, form='.3f'):
  return ', '.join(format(x, form) for x in values)


def machine(name):
  device, versions, *_ = load(name)['machine']
  device = device.removeprefix('device: ').partition(' (')[0]
  return f'{device}; {versions.removeprefix("versions: ")}'


def language():
  tiny = load('tiny')
  others = tiny['ultramem_tiny_by_value_optimizer']
  runs = [
    ('dense:tiny', '-', tiny['runs']['dense_tiny'], '-'),
    ('ultramem:tiny', '`adamw`', tiny['runs']['ultramem_tiny'], '12'),
    ('ultramem:tiny', '`row_adam`', others['row_adam'], '12.1'),
    ('ultramem:tiny', '`lazy_row_adam`', others['lazy_row_adam'], '12.1'),
    ('ultramem:tiny', '`row_adagrad`', others['row_adagrad'], '4.1'),
  ]
  rows = []
  for recipe, optimizer, of_seeds, size in runs:
    of_seeds = sorted(of_seeds, key=lambda run: run['seed'])
    bits = [run['validation_bits_per_byte'] for run in of_seeds]
    rows.append(
      [f'`{recipe}`', optimizer, f'{np.mean(bits):.3f}', each(bits), size]
    )
  text, speed = tiny['text'], tiny['tokens_per_second']
  spans = [span(speed[n], ',.0f') for n in ('dense_tiny', 'ultramem_tiny')]
  head = ['recipe', 'values trained by', 'bits/byte, mean', 'seeds 0, 1, 2']
  first = table([*head, 'bytes a value, with state'], rows)
  losses = by_seed('compare_cpu', 'validation_loss')
  dense = np.mean(losses['dense'])
  compared = table(
    ['architecture', 'nats/byte, mean', 'against dense', 'seeds 0, 1, 2'],
    [
      [NAMES[n], f'{np.mean(x):.3f}', f'{np.mean(x) - dense:+.3f}', each(x)]
      for n, x in losses.items()
    ],
  )
  walk = by_seed('compare_cpu_ablation', 'validation_loss')
  names = list(walk)
  steps = table(
    ['step', 'change, seeds 0 and 1, nats/byte', 'published, nats/token'],
    [
      [
        f'`{name}`',
        each(np.subtract(walk[name], walk[before]), '+.3f'),
        f'{_PUBLISHED[name]:+.3f}',
      ]
      for before, name in itertools.pairwise(names)
    ],
  )
  gains = np.subtract(walk['pkm'], walk['query_conv'])
  return f"""# Language

Tiny models of equal FLOPs per token on the sources of Python, which every installation carries.

## The main job
600 steps of 2,048 bytes on two CPU cores, {text['validation_bytes']:,} bytes of validation: `python train.py --config=NAME
--config.train.seed=SEED --config.optimizer.value_optimizer=...`; figures in `results/tiny.json`.

{first}

`row_adagrad` with a bf16 table takes 2.1 bytes a value. It is a tie: means differ by less than seeds do. `gzip -9` has
{text['gzip_9_bits_per_byte']:.3f} bits/byte and `xz -9` {text['xz_9_bits_per_byte']:.3f}. Dense takes {spans[0]} tokens/s and the model
with a memory layer {spans[1]}.

## Architectures at equal budgets
`python -m jaxsparse compare --suite=configs/compare/cpu.py --workdir=...`: all sizes are derived from one budget of FLOPs a token and of
sparse parameters, and all train on the same batches of 0.8M bytes; figures in `results/compare_cpu.json`.

{compared}

![Validation loss of each architecture](../../results/compare_cpu.png)

## From product keys to UltraMem
The suite `cpu_ablation` walks from PKM to UltraMem step by step, as Table 2 of arXiv:2411.12364 does; figures in
`results/compare_cpu_ablation.json`.

{steps}

The walk gains {gains[0]:.3f} and {gains[1]:.3f} nats/byte in the two seeds (published: 0.092), but by other steps than published, and
several steps differ by more between seeds than they change.

![Validation loss at each step of the walk](../../results/compare_cpu_ablation.png)
"""


def _recall_table(name, people):
  shares = by_seed(name, 'recall', people)
  flops = by_seed(name, 'flops_per_token', people)
  parameters = by_seed(name, 'parameters', people)
  dense = np.mean(shares['dense'])
  rows = sorted(shares.items(), key=lambda item: -np.mean(item[1]))
  return table(
    ['architecture', 'recalled, mean', 'of dense', 'seeds 0, 1, 2, %']
    + ['FLOPs a token', 'parameters'],
    [
      [
        NAMES[n],
        f'{100 * np.mean(x):.0f} %',
        f'{np.mean(x) / dense:.1f}x',
        each(100 * np.array(x), '.0f'),
        f'{flops[n][0]:,}',
        f'{parameters[n][0]:,}',
      ]
      for n, x in rows
    ],
  )


def recall():
  return f"""# Recall

What a model knows: the share of facts about made-up people that a model of about 0.1 MFLOPs a token completes exactly. All models have
the same FLOPs a token, and all but dense the same number of parameters (embeddings not counted).

## 24,000 facts, each told 96 times
`python -m jaxsparse compare --suite=configs/compare/facts_24000.py --workdir=...`; figures in `results/compare_facts_24000.json`.

{_recall_table('compare_facts_24000', 4000)}

On the mean all recall more than three times as much as dense. Seeds differ by up to 1.5 times, so the order among the sparse ones is
no finding. Learning rates were chosen for each; the suite's docstring has what was tried.

![Recall of 24,000 facts](../../results/compare_facts_24000.png)

## 6,000 facts, each told 48 times
`--suite=configs/compare/facts.py`; figures in `results/compare_facts.json`.

{_recall_table('compare_facts', 1000)}

## 3,000 facts, each told 48 times
The same suite and file.

{_recall_table('compare_facts', 500)}

![Recall of 3,000 and 6,000 facts](../../results/compare_facts.png)
"""


def attention():
  loss = by_seed('compare_attention', 'validation_loss')
  heads = _loss_table(loss, 'control')
  loss = by_seed('compare_sparse_attention', 'validation_loss')
  sparse = _loss_table(loss, 'dense')
  needles = table(
    ['attention', 'facts found, mean', 'seeds 0, 1, 2, %'],
    [
      [NAMES[n], f'{100 * np.mean(x):.0f} %', each(100 * np.array(x), '.0f')]
      for n, x in by_seed('compare_needles', 'needles_found').items()
    ],
  )
  cpu, h200 = seconds('attention_cpu'), seconds('attention_h200')
  reading = load('long_input_cpu')['results']
  resident = [row['resident_bytes'] / 1e6 for row in reading]
  return f"""# Attention

## Composed heads
DCMHA (arXiv:2405.08553) against plain heads, and against plain heads whose MLP is wider by DCMHA's FLOPs:
`compare --suite=configs/compare/attention.py`; figures in `results/compare_attention.json`.

{heads}

![Validation loss with composed heads](../../results/compare_attention.png)

## Sparse attention
Blocks of keys chosen by importance, at 27 to 29 % of blocks, against dense attention and a window alone:
`compare --suite=configs/compare/sparse_attention.py`; figures in `results/compare_sparse_attention.json`. Below dense it is better.

{sparse}

![Validation loss with sparse attention](../../results/compare_sparse_attention.png)

Facts that stand behind the window, which only chosen blocks can reach: `compare --suite=configs/compare/needles.py`; figures in
`results/compare_needles.json`.

{needles}

## Speed
`python -m jaxsparse bench attention`. On two cores ({machine('attention_cpu')}; `results/attention_cpu.json`):

{_speed_table(cpu)}

A train step of 1,024 positions takes {_ratio(cpu, 'DCMHA')}x the time with composed heads, and {_ratio(cpu, 'query-wise')}x with
query-wise ones (the aim was 1.33x). On an H200 ({machine('attention_h200')}; `results/attention_h200.json`; the run was ended before its
training task):

{_speed_table(h200)}

## Long input
A model of sparse and local blocks reads {load('long_input_cpu')['arguments']['tokens']:,} tokens in memory that does not grow:
{span(resident, '.0f')} MB resident over {len(reading)} stretches of 32,768 (`python -m jaxsparse bench long_input`,
`results/long_input_cpu.json`).
"""


def _loss_table(loss, reference):
  base = loss[reference]
  return table(
    ['attention', 'nats/byte, mean', f'against {NAMES[reference]}']
    + ['seeds 0, 1, 2'],
    [
      [
        NAMES[n],
        f'{np.mean(x):.3f}',
        f'{span(np.subtract(x, base), "+.3f")}',
        each(x),
      ]
      for n, x in loss.items()
    ],
  )


def _ratio(time, contender):
  task = 'train 1,024'
  return f'{time[task, contender] / time[task, "plain heads"]:.2f}'


def _speed_table(time):
  rows = []
  for task in dict.fromkeys(task for task, _ in time):
    if task.startswith('train'):
      continue
    sparse, dense = time[task, 'sparse'], time[task, 'dense']
    cudnn = time.get((task, 'cuDNN'))
    rows.append(
      [
        task,
        f'{1e3 * dense:.2f} ms',
        f'{1e3 * sparse:.2f} ms',
        f'{dense / sparse:.1f}x',
        f'{cudnn / sparse:.1f}x' if cudnn else '-',
      ]
    )
  return table(
    ['task', 'dense', 'sparse', 'sparse is faster than dense', 'than cuDNN'],
    rows,
  )
