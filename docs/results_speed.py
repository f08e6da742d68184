# SPDX-License-Identifier: Apache-2.0
"""The pages of results that are about speed, and the list of all pages."""

import results_continual
import results_decode
import results_pictures
import results_quantized
import results_serving
import results_tables
from results_tables import load, machine, seconds, table


def tables():
  step = seconds('train_step_cpu')
  size = {
    (r['task'], r['contender']): (r['num_values'], r['bytes_per_value'])
    for r in load('train_step_cpu')['results']
  }
  steps = table(
    ['optimizer', 'bytes a value', 'time with a table 64x larger'],
    [
      [
        f'`{n}`',
        f'{size[n, "64x table"][1]:.1f}',
        f'{step[n, "64x table"] / step[n, "1x table"]:.2f}x',
      ]
      for n in ('row_adam', 'row_adagrad', 'adamw')
    ],
  )
  bag = seconds('value_bag_cpu')
  bags = table(
    ['task', 'form', 'time', 'of ours'],
    [
      [task, name, f'{1e3 * s:.0f} ms', f'{s / _ours(bag, task):.1f}x']
      for (task, name), s in bag.items()
    ],
  )
  layer = seconds('memory_layer_cpu')
  layers = table(
    ['form', 'forward', 'with gradients', 'forward, of ours']
    + ['with gradients, of ours'],
    [
      [
        name,
        f'{1e3 * s:.0f} ms',
        f'{1e3 * layer["forward + backward", name]:.0f} ms',
        f'{s / _ours(layer, "forward"):.1f}x',
        f'{layer["forward + backward", name] / _ours(layer, "forward + backward"):.1f}x',
      ]
      for (task, name), s in layer.items()
      if task == 'forward'
    ],
  )
  large = f'{size["adamw", "64x table"][0] / 1e6:.0f}M'
  return f"""# Tables and experts

## A step with a larger table
A train step of `ultramem:tiny` with a table of {large} values in place of {size['adamw', '1x table'][0] / 1e6:.1f}M:
`python -m jaxsparse bench train_step`; figures in `results/train_step_cpu.json` ({machine('train_step_cpu')}).

{steps}

## Pooling rows
4,096 tokens pool 32 rows each of 262,144 x 256: `python -m jaxsparse bench value_bag`; figures in `results/value_bag_cpu.json`
({machine('value_bag_cpu')}). The aim was 5x as fast as `einsum`.

{bags}

## A whole layer
The memory layer of `ultramem:227m_release` on 512 tokens: `python -m jaxsparse bench memory_layer`; figures in
`results/memory_layer_cpu.json` ({machine('memory_layer_cpu')}).

{layers}

## Experts
64 rows on some of 64 experts: `python -m jaxsparse bench grouped_matmul`; figures in `results/grouped_matmul_cpu.json`
({machine('grouped_matmul_cpu')}) and `results/grouped_matmul_h200.json` ({machine('grouped_matmul_h200')}).

{_experts()}
"""


def _ours(bag, task):
  return min(
    s for (t, n), s in bag.items() if t == task and n.startswith('jaxsparse')
  )


def _experts():
  cpu, h200 = seconds('grouped_matmul_cpu'), seconds('grouped_matmul_h200')
  return table(
    ['task', 'form', 'CPU', 'H200'],
    [
      [task, f'`{name}`' if '_' in name else name]
      + [f'{1e6 * time[task, name]:,.0f} us' for time in (cpu, h200)]
      for task, name in cpu
    ],
  )


def cpu():
  results = load('train_cpu')['results']
  first = {r['size']: r for r in reversed(results)}
  names = {
    'torch': 'PyTorch, eager', 'torch.compile': 'PyTorch, `torch.compile`',
    'jaxsparse dense': '`dense:tiny`', 'jaxsparse ultramem': '`ultramem:tiny`',
  }  # fmt: skip
  tasks = ['train', 'prefill 1', 'prefill 16', 'decode 1', 'decode 16']
  rows = []
  for r in results:
    name = names[r['contender']]
    if r['size'] == '25m' and 'jaxsparse' in r['contender']:
      name = 'jaxsparse'
    base = first[r['size']]['seconds']
    rows.append(
      [r['size'], name]
      + [f'{base[t] / r["seconds"][t]:.2f}x' for t in tasks]
      + [f'{r["share_of_matmul"]:.0%}', f'{r["start_seconds"]:.1f} s']
    )
  rates = {
    (r['size'], r['contender']): 2 * 1024**3 / r['seconds']['matmul'] / 1e9
    for r in results
  }
  ours, theirs = (rates['25m', n] for n in ('jaxsparse dense', 'torch'))
  made = table(
    ['size', 'model', 'training', 'prompt, 1', 'prompt, 16']
    + ['decoding, 1', 'decoding, 16', 'of its matmul', 'first step'],
    rows,
  )
  return f"""# Training on a CPU

Beside a plain PyTorch model of the same sizes, on the same two cores in turns: fused AdamW, PyTorch's own attention and norms.
Speeds are relative to eager PyTorch, of training, of a prompt of 64 tokens and of decoding after it, for 1 and for 16 sequences.
"Of its matmul" is the share that training reaches of a square float32 product by the same library, "first step" the seconds from
the start of the process with nothing compiled before. `tiny` is 128 wide with 4 blocks, and `ultramem:tiny` has the FLOPs per token
of the dense model; `25m` is 512 wide with 8 blocks. `python -m jaxsparse bench train --peer=torch`; figures in
`results/train_cpu.json` ({machine('train_cpu')}).

{made}

The aims were 1.0x for training `dense:tiny` and `25m`, 0.9x for `ultramem:tiny`, and 1.1x for prompts. At `25m` nearly all of a step is
products: JAX's reached {ours:.0f} GFLOP/s in this run and PyTorch's {theirs:.0f}. In `ultramem:tiny`, the best of many scores (10 % of a
step) and the pooling of rows and its gradients (15 %) are what a dense model has not.

## What made it so
Ratios of two builds or forms in turns, on two cores, JAX 0.10.2.

- Products of tokens in one dimension, [B T, D] and not [B, T, D] (`ops/token_product.py`): 1.15x of a step of `dense:tiny`.
- Attention with heads before positions from the rotation on, and the first half of the rows read without the second
  (`ops/attention/cpu.py`): 1.25x of an attention layer, forward and backward; 1.16x at `25m`.
- Cosines and sines of the rotation computed once: behind a broadcast XLA's CPU computes them again for every head, forward and backward,
  even behind `optimization_barrier`; a product with the identity is stored (`ops/cpu.py`).
- Gradients of keys and values that turn over the smaller side of a product (`ops/cpu.py`): 1.1x of a step, of `dense:tiny` and of
  `ultramem:tiny`; those of memory keys and queries scaled in place of scores 1.1x of `ultramem:tiny`.
- Parameters drawn in one dimension: their program compiles in 2.2 s instead of 3.8, that of `ultramem:tiny` in 2.8 s instead of 6.3.
- The first step compiles while the first parameters are made.

## To the first step
From the start of `train.py --config=ultramem:tiny` to its first step, this code and the one before it in turns, two runs each: 15.5 s with
nothing kept where it took 25.1 (0.62x; the aim was 0.45x), and 8.0 s with compiled programs kept where it took 9.5 (0.85x).
`generate` of two tokens, as a whole process: 7.8 s where it took 8.5, and 4.3 where it took 5.6. What is left is
work for both cores: 2.5 s of imports, 0.6 s to trace and 4 s of a core to compile the program that makes the parameters, 2.3 s to trace and
lower the training step and 9 s of a core to compile it. XLA's CPU compiles each kernel by itself, at 13 ms of a core whatever it computes
(40 arrays of zeros take 0.7 s), and the step has 770: 64 for the attention of each block and 18 for its two norms, 135 for AdamW, three
for each parameter, 120 for the memory layer.

## What did not help
- A gradient of our own for the gated product of the MLP, alone or with the sigmoid kept: 0.85x to 1.0x of XLA's.
- Queries, keys and values by one product: what follows must cut it up again, which costs more than the product gains.
- A softmax that keeps exponentials and sums, or that makes scores again in the backward pass: within 3 % of plain gradients once scores
  of later keys are left out.
- Compiling with fewer optimizations, without LLVM's dear passes or without fusion emitters: no shorter, or slower steps.
- Parameters drawn by one small program for each shape: as long as one program, as deriving keys and several dimensions are what takes long.
- Draws of one size by one loop and all keys by one product of `vmap`, the same numbers by a third of the kernels: 0.8x of a core's
  time to compile, as each parameter's slice and scale is a kernel still.
- Learning rates as constants, so that no update holds the schedule: no shorter to compile.
- A loop over equal blocks, parameters stacked (12 blocks of an MLP, 576 wide): a decoding step of one sequence takes 1.65x, as the
  loop copies each block's matrices out of the stack; a training step 1.08x; and where blocks with a memory layer stand between, as in
  `ultramem:tiny`, only one block of four would be saved.
- Other ways to add up the gradient of a table (`table.gradient`), training `ultramem:tiny`: 'sorted' 1.03x and 'deterministic' 1.02x of
  'scatter', which is within what two runs differ by.
"""


PAGES = dict(
  language=results_tables.language, recall=results_tables.recall,
  decode=results_decode.decode, attention=results_tables.attention,
  tables=tables, cpu=cpu, serving=results_serving.serving,
  quantized=results_quantized.quantized, continual=results_continual.continual,
  pictures=results_pictures.pictures,
)  # fmt: skip
