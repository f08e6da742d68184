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


def _decode_table(cells):
  groups = {}
  for cell in cells:
    key = cell['batch_size'], cell['task'].split(',')[0]
    groups.setdefault(key, {}).setdefault(cell['contender'], []).append(cell)
  rows = []
  for (batch, cache), by_model in sorted(groups.items()):
    ours = by_model['ultramem']
    row = [batch, cache]
    for name in ('ultramem', 'pkm', 'moe'):
      of_model = by_model.get(name)
      ratios = of_model and [cell['to_dense'] for cell in of_model]
      row.append(f'{span(ratios)}x' if ratios else '-')
    row += [
      f'{span([c[k] for c in ours], ".1f")}x'
      for k in ('moe_ratio', 'moe_limit')
    ]
    rows.append(row)
  return table(
    ['batch', 'KV heads']
    + ['UltraMem / dense', 'PKM / dense', 'MoE / dense']
    + ['MoE / UltraMem', 'the same by bytes'],
    rows,
  )


def h200_cells():
  return [
    cell
    for section in load('decode_h200')['sections']
    for cell in section['results']
  ]


def decode():
  cpu, cells = load('decode_cpu')['results'], h200_cells()
  context = [
    s['arguments']['context'] for s in load('decode_h200')['sections']
  ][0]
  return f"""# Decoding

Time of one decode step of a batch: attention, MLPs or experts, and memory layers, as ratios within one run. `KV /8` has one key/value
head for eight query heads. Ranges are over uniform and Zipf-distributed tokens; "by bytes" is what MoE must read more than UltraMem.

## H200, the 680M family
bfloat16, {context:,} tokens of context; what to run says `python -m jaxsparse bench decode --help`; figures in
`results/decode_h200.json`, from one GPU ({machine('decode_h200')}).

{_decode_table(cells)}

At batch 64 and KV /8 the aims were at most 1.15x of dense, and MoE at least 4x of UltraMem.

### Since then, without a GPU
These steps launched about 350 kernels (dense) and 120 more (UltraMem). Since then two rows are decoded at least, parameters are folded when
they are loaded, no selection cuts a graph, and Triton kernels have a memory layer's retrieval and bag, attention from a block's products on,
and experts without sorting. **None of that has run on a GPU**: the kernels were interpreted on a CPU against their references, and compiled
ahead of time for an H100. `tests/aot` (`pytest -m aot`) asserts of those programs how many kernels a dense block, a MoE block and a memory layer
have and what is outside of blocks, at most how many graphs a step is (two, and no selection of XLA's between), that no weight is laid out
anew or written as a product, in a step of one text neither, which temporaries there are, that the cache stays in place, and that no kernel
spills registers. It tells nothing about time. What is to be measured is one command, see [](../guides/gpu.md).

What can be expected is no 4x. Bytes allow the MoE to take {max(c['moe_limit'] for c in cells if c['batch_size'] == 64):.1f}x the time of UltraMem at batch 64, but launches take as long as reading there,
and what makes UltraMem faster makes the MoE faster, too: by a model of bytes and launches (90 % of copy bandwidth, 2 us a kernel)
about 3.5x, and 4x only at the least number of kernels that one could think of, seven a block and seven a memory layer.

## CPU
A family of our own (width 512, six blocks), float32, on one core; `python -m jaxsparse bench decode`; figures in
`results/decode_cpu.json` ({machine('decode_cpu')}), of an older version.

{_decode_table(cpu)}

{_old_beside_new()}
"""


def _least_ratio(of, batch):
  ours, dense = (
    min(of[batch, name]['new_rounds']) for name in ('ultramem', 'dense')
  )
  return ours / dense


def _old_beside_new():
  found = load('decode_old_new_cpu')
  of = {(c['batch_size'], c['contender']): c for c in found['results']}
  batches = sorted({batch for batch, _ in of})
  rows = []
  for batch in batches:
    dense = of[batch, 'dense']
    row = [batch]
    for name in ('ultramem', 'pkm', 'moe'):
      cell = of[batch, name]
      old, new = (
        cell[f'{k}_seconds'] / dense[f'{k}_seconds'] for k in ('old', 'new')
      )
      row.append(f'{old:.2f}x, {new:.2f}x')
    for name in ('dense', 'ultramem', 'pkm', 'moe'):
      cell = of[batch, name]
      row.append(f'{cell["new_seconds"] / cell["old_seconds"]:.2f}x')
    rows.append(row)
  shown = table(
    ['batch']
    + [f'{NAMES[n]} / dense: old, new' for n in ('ultramem', 'pkm', 'moe')]
    + [f'{NAMES[n]}: new / old' for n in ('dense', 'ultramem', 'pkm', 'moe')],
    rows,
  )
  return f"""### Folded parameters, and selection by groups
Commit {found['old']} beside what there is now, KV /{found['kv_group']}, on one core ({machine('decode_old_new_cpu')}): {found['how']};
figures in `results/decode_old_new_cpu.json`. Batches 1 and 16, whose rows are too few for selection by groups, were run before it. Rounds of
one program differ by up to a quarter and medians of two such runs by 10 %.

{shown}

The aims were UltraMem at most 1.1x of dense up to batch 64 and 1.15x at 256: **both are missed**, at 256
also by least times ({_least_ratio(of, 256):.2f}x). What is left of a memory layer at 256 beyond
its products is its selection (two thirds of what it was; top m of both axes and of the grid took 1.1 dense MLPs) and its bag (0.6 of an
MLP, half of it the reading of rows).

What did not help: two rows instead of one at batch 1 (1.4 to 1.9 times the time, also with 2,048 tokens of context), the best of groups by
XLA's own top-k twice (1.15x of once), and bits of all candidates by sums over the last axis (14x). On a TPU v5e, compiled ahead of
time, top-k is one sort or one custom call and bisection 79 to 85 fusions; and for one row no weight is laid out anew (98 operations of two
blocks, 99 for two rows), so both stay as they were."""


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
