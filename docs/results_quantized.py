# SPDX-License-Identifier: Apache-2.0
"""The page of results about models in 8 and 4 bits."""

from results_tables import load, machine, table

from jaxsparse.experiments.bench import quantized_loss

LOSSES = {
  '`ultramem:tiny`': 'quantized_loss_ultramem_tiny',
  'SmolLM2-135M': 'quantized_loss_smollm2',
  'facts': 'quantized_loss_facts',
}

FACTS = 6000


def losses(model):
  """Form -> its record."""
  return {r['form']: r for r in load(LOSSES[model])['results']}


def lost(record):
  return f'{record["lost"]:+.5f} ± {record["lost_stderr"]:.5f}'


def times():
  """(task, what numbers are stored as) -> its record, with its ratio to f32."""
  found, base = {}, {}
  for r in load('quantized_cpu')['results']:
    seconds = base.setdefault(r['task'], r['seconds'])
    ratio = r['seconds'] / seconds
    found[r['task'], r['contender']] = r | dict(ratio=ratio)
  return found


def megabytes(count):
  return f'{count / 1e6:.2f} MB'


def quantized():
  tiny, smol, facts = map(losses, LOSSES)
  rows = [
    [
      name,
      megabytes(r['table_bytes']),
      megabytes(r['dense_bytes']),
      f'{r["bits_per_byte"]:.4f}',
      lost(r),
      lost(smol[name]) if name in smol else '-',
      ' and '.join(f'{x:.1%}' for x in facts[name]['recall_by_model']),
    ]
    for name, r in tiny.items()
  ]
  aims = [
    [
      name,
      f'{aim:+.4f}',
      f'{lost(found[name])}: {quantized_loss.verdict(found[name])}',
    ]
    for name, aim in quantized_loss.AIMS.items()
    for found in [tiny]
  ]
  aims.append(
    [
      'dense int8, SmolLM2-135M',
      f'{quantized_loss.AIMS["dense int8"]:+.4f}',
      f'{lost(smol["dense int8"])}: '
      f'{quantized_loss.verdict(smol["dense int8"])}',
    ]
  )
  first, of_smol = tiny['f32'], smol['f32']
  head = ['stored as', 'tables', 'all else', 'bits per byte', 'lost']
  time_rows = [
    [
      task,
      name,
      megabytes(r['bytes']),
      f'{1e3 * r["seconds"]:.2f} ms',
      f'{r["ratio"]:.2f}x',
      megabytes(r['temp_bytes']),
    ]
    for (task, name), r in times().items()
  ]
  bags = {
    r['contender']: r['seconds'] for r in load('quantized_bag_cpu')['results']
  }
  quiet = {name: seconds / bags['f32'] for name, seconds in bags.items()}
  rounds = load('quantized_cpu')['arguments']['rounds']
  return f"""# In 8 and 4 bits

![Bits per byte lost against bytes, and time of a bag](../pictures/quantized.png)

## What is lost
`ultramem:tiny` after its recipe's 600 steps, means over three seeds, scored on {first['text_bytes']:,} bytes of its validation text in {first['windows']} windows:
`jaxsparse bench quantized_loss --workdir=runs/ultramem_tiny_0,runs/ultramem_tiny_1,runs/ultramem_tiny_2`. SmolLM2-135M, imported from a file of 4 bits (Q4_1), on {of_smol['text_bytes']:,} bytes of enwik8 from byte 95,000,000 in
{of_smol['windows']} windows of 256 tokens ({of_smol['bits_per_byte']:.4f} bits per byte in float32): `--text=` and, for GPTQ, `--calibrate=` name files, and `--window=256`.
Figures in `results/quantized_loss_ultramem_tiny.json` and `results/quantized_loss_smollm2.json`. A loss is to float32, window by window, with the
standard error of that difference. Recall is of two seeds of the suite of facts, Memory+ with 1,000 people, the share of {FACTS:,} facts that it has:
`jaxsparse compare --suite=configs/compare/facts.py --only=memory_plus --people=1000 --seeds=0,1 --keep --workdir=runs/facts`, then `jaxsparse bench
quantized_loss --people=1000 --workdir=` with both its runs (`results/quantized_loss_facts.json`).

{table([*head, 'lost by SmolLM2', 'recall of facts'], rows)}

int4 and nf4 of matrices are in groups of 32, with embedding and output in int8; GPTQ has 64 KB of training text, or 20 KB of enwik8 from byte
1,000,000. Rows of 3 bits and of 1 bit are no format: they are roundings that say how far a table could go. A table of zeros is the control: it
says what the table is worth. Keys and values are scored through a decoding cache.

| | aim | lost |
| --- | --- | --- |
{chr(10).join('| ' + ' | '.join(row) + ' |' for row in aims)}

## What it takes
The fastest of {rounds} calls in turns in one process, on two cores that other programs used as well: `jaxsparse bench quantized`; figures in
`results/quantized_cpu.json` ({machine('quantized_cpu')}). Ratios are to float32. A bag is of 256 tokens with 32 rows each of
262,144 x 256. A matrix is turned into numbers within each product. A decode step is one token of B sequences by an UltraMem model of 3 blocks.

{table(['task', 'stored as', 'bytes', 'time', 'to f32', 'temporaries'], time_rows)}

With nothing else running, bags alone (`--batches= --decode_batches=`, `results/quantized_bag_cpu.json`): int8 {quiet['int8']:.2f}x, int4 {quiet['int4']:.2f}x.

On a CPU rows of int8 and int4 save bytes and time; rows of bf16 and float8, and all matrices, save bytes alone.
"""
