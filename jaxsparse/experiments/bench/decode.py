# SPDX-License-Identifier: Apache-2.0
"""decode: one token for each sequence of a batch, by every architecture.

Dense, MoE, PKM and UltraMem (and UltraMemV2 by --models) have the same
backbone, cache, head and greedy sampling, the same FLOPs per token, and the
sparse ones as many parameters as each other; --family=680m has the published
budget. `steps` tokens are decoded within one compiled program, which gets the
cache donated. The cache begins with `context` random keys and values.

The program draws each next token, but is fed given ones: 'uniform' over the
vocabulary, or 'zipf', the n-th with a probability that falls as 1 / n, so that
sequences share experts and rows. A model with random weights would else repeat
itself. Which experts and rows were read is recorded by the timed program.

'least' is what a step must read, see `analysis.cost.decode_bytes`, with the
number of distinct experts and rows that it did read. 'to dense' is time over
that of the dense model; 'MoE to it' the MoE's time over the model's, and
'limit' the MoE's least bytes over the model's. A memory layer that leaves the
MoE farther behind than that limit and `margin`, three times in a row, fails the
bench: it would be the MoE that is at fault.

On a CPU give it one core, `taskset -c 0 python -m jaxsparse bench decode`: XLA
spreads a dense product over all cores, but runs the loop over experts on one,
so that at batch 1 two cores halve the time of all but the MoE. There
(results/decode_cpu.json) by --batches=1,4,16,64,256 --kv_groups=1,4,8
--routing=uniform,zipf, least and most of the six cells of a batch:

  batch    dense           UltraMem      MoE to UltraMem   bytes allow
  1          6.4-9.2 ms    1.09-1.16x    0.95-1.02x        1.00x
  4         13.3-16.0 ms   1.05-1.09x    1.45-1.59x        2.48-2.92x
  16        18.3-23.9 ms   1.04-1.15x    2.27-2.47x        4.82-5.94x
  64        45.8-59.8 ms   1.10-1.22x    1.79-1.92x        4.06-6.21x
  256        148-190 ms    1.24-1.37x    1.09-1.14x        2.17-4.24x

From batch 64 on a core has more to multiply than to read, so that the MoE's
bytes matter less and less.

On an H200 (results/decode_h200.json) by --family=680m --dtype=bfloat16
--context=2048 --steps=32 --width_multiple=64 --margin=1e9 --kv_groups=8
--models=dense,moe,pkm,ultramem --batches=64,1,16,256 --routing=uniform,zipf,
and by --kv_groups=1 at batch 64; routing makes no difference of 2 %:

  batch    dense     UltraMem  PKM    MoE    MoE to UltraMem  bytes allow
  1        1.30 ms   1.22x     1.03x  1.60x  -                1.00x
  16       1.35 ms   1.11x     1.03x  3.22x  2.91x            5.75x
  64       1.87 ms   1.25x     1.10x  3.35x  2.67x            5.12x
  256      4.25 ms   1.17x     1.06x  2.16x  1.85x            2.46x
  64, MHA  6.81 ms   1.06x            1.64x  1.55x            1.76x

Dense reads at half of the copy bandwidth (batch 64), as most of its 350 kernels
are short; UltraMem has 120 more. At batch 1 the MoE is slower than bytes allow,
by its router's short kernels, so no ratio is stated; --margin let that pass.
Kernels at once (`compile_decode`) took UltraMem at batch 64 from 2.70 to 2.52
ms and dense from 2.17 to 2.12, but at batch 1 they may have cost the MoE 0.2.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence

import jax

from jaxsparse.analysis import budget, cost
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require, require_choice
from jaxsparse.config.tables import TABLE_TYPES
from jaxsparse.experiments.bench import decode_models
from jaxsparse.experiments.bench.decode_cell import Cell, compiler_options
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.nn.transformer import init_cache

OPTIONS = dict(
  family='own',
  # With commas between, like the next three.
  models='dense,moe,pkm,ultramem',
  batches='1,4,16,64',
  # Query heads to one of keys and values; 1 is multi-head attention.
  kv_groups='1,4',
  routing='uniform',
  # Tokens before, in every sequence.
  context=64,
  # Tokens of a call.
  steps=8,
  rounds=5,
  # By how much a ratio may pass the limit, for noise.
  margin=0.1,
  dtype='float32',
  # Of value tables; that of all else by default.
  table_dtype='',
  # Rows of a step at least: a batch of fewer is repeated. 0 for what generate
  # and the server have. Bytes and tokens are counted without repeats.
  least_rows=0,
  # Of XLA, as in 'xla_gpu_enable_pdl=true', with commas between.
  compiler_options='',
  # Folder for what a GPU's autotuner has found, a file for each program.
  autotune='',
  # Sizes of the family 'own': of the dense model; parameters of a sparse one in
  # those of the dense one; experts and slots of a head that a token uses.
  model_dim=512,
  layers=6,
  heads=8,
  # No power of two: columns of a matrix would meet in few lines of a cache.
  mlp_dim=2000,
  vocab=4096,
  growth=8,
  used=2,
  selected=32,
  width_multiple=16,
)


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of all cells.

  Raises:
    UserError: an option has no sense, or a ratio passes its physical limit.
  """
  check(options)
  if jax.default_backend() == 'cpu' and _num_cores() > 1:
    print(
      'Only one core is fair to the MoE, see `--help`: this has '
      f'{_num_cores()}; give it one by taskset -c 0.',
      flush=True,
    )
  refused = None
  for group in numbers(options, 'kv_groups'):
    models = decode_models.make_models(options, group)
    params = {n: decode_models.draw_params(m) for n, m in models.items()}
    for name, model in models.items():
      params[name] = fold_for_decode(model, params[name])
      print(f'KV /{group} {name}: {_describe(model, options)}', flush=True)
    for batch_size in numbers(options, 'batches'):
      task = f'KV /{group}, batch {batch_size}'
      if not fits(models, params, options, batch_size):
        print(f'{task}: left out, it does not fit on the device.', flush=True)
        continue
      cell = Cell(models, params, options, batch_size)
      for routing in options.routing.split(','):
        task = f'KV /{group}, {routing}, batch {batch_size}'
        rows, error = measure_cell(cell, routing, task, options.margin)
        refused = refused or error  # Raised when all else was measured, too.
        yield from rows
    del params
  if refused:
    raise refused


def measure_cell(
  cell: Cell, routing: str, task: str, margin: float
) -> tuple[list[dict], UserError | None]:
  """Records, and why they are refused, if they are.

  What passes its limit is measured again, twice at most: a busy machine is the
  usual reason.
  """
  for _ in range(3):
    rows = cell.records(task, cell.take_turns(routing))
    try:
      refuse_impossible(rows, margin)
    except UserError as error:
      refused = error
      print(error, flush=True)
    else:
      return rows, None
  return rows, refused


def refuse_impossible(records: Sequence[dict], margin: float) -> None:
  """Refuses a win over the MoE that bytes don't allow.

  The dense model is no judge of it: without a memory layer's own operations it
  comes as near to the limit as noise lets it.

  Raises:
    UserError: a memory layer's ratio is above its limit by more than `margin`.
  """
  for record in records:
    if record['contender'] in ('dense', 'moe') or 'moe_ratio' not in record:
      continue
    ratio, limit = record['moe_ratio'], record['moe_limit']
    if ratio > limit * (1 + margin):
      raise UserError(
        f'{record["task"]}: the MoE takes {ratio:.2f} times as long as '
        f'{record["contender"]}, but must read only {limit:.2f} times as much '
        f'(margin {margin:.0%}): the MoE is no fair baseline here, or the '
        'machine was busy; no ratio is published.'
      )


def show(records: Sequence[dict]) -> None:
  if len(records) == 1:
    print(
      f'{"task":<28}{"model":<13}{"step":>12}{"least":>10}{"rate":>11}'
      f'{"of copy":>9}{"to dense":>10}{"MoE to it":>11}{"limit":>8}{"hit":>9}'
    )
  r = records[-1]
  line = f'{r["task"]:<28}{r["contender"]:<13}{r["seconds"] * 1e3:>9.3f} ms'
  line += f'{r["least_bytes"] / 1e6:>7.0f} MB'
  line += f'{r["bytes_per_second"] / 1e9:>6.1f} GB/s'
  line += f'{r["share_of_copy"]:>9.0%}'
  for name, width in (('to_dense', 9), ('moe_ratio', 10), ('moe_limit', 7)):
    line += f'{r[name]:>{width}.2f}x' if name in r else ' ' * (width + 1)
  print(f'{line}{r["distinct_per_layer"]:>9.1f}')


def _describe(model, options):
  count = cost.count_parameters(model).published
  flops = cost.forward_flops(model, options.context)
  return (
    f'{count / 1e6:.1f} M parameters, {flops / 1e6:.1f} MFLOP per token, '
    f'{budget.describe(model)}'
  )


def fits(
  models: Mapping[str, ModelConfig],
  params: Mapping[str, dict],
  options: argparse.Namespace,
  batch_size: int,
) -> bool:
  """Whether parameters and cache leave a tenth of the device's memory free."""
  limit = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
  if limit is None:
    return True
  model = next(iter(models.values()))
  length = options.context + options.steps
  cache = jax.eval_shape(lambda: init_cache(model, batch_size, length))
  arrays = jax.tree.leaves((params, cache))
  return sum(x.size * x.dtype.itemsize for x in arrays) < 0.9 * limit


def _num_cores():
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def numbers(options: argparse.Namespace, name: str) -> list[int]:
  """Those of an option.

  Raises:
    UserError: one is none, or not positive.
  """
  text = getattr(options, name)
  parts = text.split(',')
  require(
    all(part.isdigit() and int(part) > 0 for part in parts),
    f'{name} must be positive numbers with commas between, got {text!r}.',
  )
  return [int(part) for part in parts]


def check(options: argparse.Namespace) -> None:
  """Refuses options that have no sense.

  Raises:
    UserError: there is one.
  """
  for name in ('context', 'steps', 'rounds'):
    value = getattr(options, name)
    require(value > 0, f'{name} must be positive, got {value}.')
  require(
    options.least_rows >= 0,
    f'least_rows must be at least 0, got {options.least_rows}.',
  )
  for kind in options.routing.split(','):
    require_choice(
      argparse.Namespace(routing=kind), 'routing', ('uniform', 'zipf')
    )
  numbers(options, 'batches')
  require_choice(options, 'table_dtype', ('', *TABLE_TYPES))
  given = compiler_options(options.compiler_options)
  require(
    all(given),
    'compiler_options must be like NAME=VALUE, with commas between, got '
    f'{options.compiler_options!r}.',
  )
