# SPDX-License-Identifier: Apache-2.0
"""The page of decode steps: an H200's, and a CPU's old beside new."""

from results_tables import NAMES, load, machine, span, table


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
have, that nine are outside of blocks, how many bytes a memory layer moves, at most how many graphs a step is (two, and no selection of XLA's
between), that no weight is laid out anew or written as a product, in a step of one text neither, which temporaries there are, that the cache
stays in place, and that no kernel spills registers. It tells nothing about time. What is to be measured is one command, see
[](../guides/gpu.md).

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
