# SPDX-License-Identifier: Apache-2.0
"""quantized: bags, products and decode steps by how numbers are stored.

Each task begins with float32, to which ratios are. A time is that of the
fastest of `rounds` calls, so that a busy machine may be used. 'bytes' are those
of all rows, of the matrix, or of the model; temporaries are of the compiled
program.

A bag pools `entries` rows of each of `tokens`, drawn evenly, and others in each
call, as rows that were just read would be in a cache. A product is of B inputs
and a square matrix, which is turned into numbers within the program, as
everywhere in a model. A decode step is one token for each sequence
by an UltraMem model, one call a step: in a loop of many, XLA may turn matrices
into numbers once for all of them. See `quantized_loss` for what is lost.
"""

import argparse
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config.errors import require
from jaxsparse.experiments.bench import decode, decode_models, measuring
from jaxsparse.experiments.bench.decode_cell import Cell
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.quantize import bytes_by_part, parse, quantize
from jaxsparse.ops import quantized_matrix
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.ops.tables import quantized_table, row_format

OPTIONS = dict(
  # Of the table and of a bag.
  rows=262_144,
  width=256,
  tokens=256,
  entries=32,
  # Of the matrix, and inputs of a product, with commas between; '' for none.
  size=1024,
  batches='1,16,64',
  # Sequences of a decode step, with commas between; '' for no decoding.
  decode_batches='1,16',
  # Of the decoding model, and by how much its tables make it larger.
  model_dim=256,
  layers=3,
  mlp_dim=1000,
  growth=8,
  # Tokens before, in every sequence.
  context=64,
  rounds=301,
)

# Slots of so many calls differ.
_DRAWS = 16

# What is called so, as `--quantize=` has it.
MODELS = {
  'f32': '',
  'tables int8': 'tables=int8',
  'tables int4': 'tables=int4',
  'dense int8': 'weights=int8',
  'dense int4': 'weights=int4',
  'both int8': 'weights=int8,tables=int8',
  'both int4': 'weights=int4,tables=int4',
}


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of all tasks.

  Raises:
    UserError: an option has no sense.
  """
  batches = _numbers('batches', options.batches)
  decode_batches = _numbers('decode_batches', options.decode_batches)
  yield from _bags(options)
  yield from _products(options, batches)
  yield from _decoding(options, decode_batches)


def _bags(options):
  rng = np.random.default_rng(0)
  shape = (options.tokens, options.entries)
  rows = jnp.asarray(
    rng.standard_normal((options.rows, options.width), np.float32)
  )
  slots = [
    jnp.asarray(rng.integers(0, options.rows, shape, dtype=np.int32))
    for _ in range(_DRAWS)
  ]
  weight = jnp.asarray(rng.standard_normal((*shape, 1), np.float32))
  tables = {'f32': rows, 'bf16': rows.astype(jnp.bfloat16)}
  for kind in row_format.KINDS:
    tables[kind] = quantized_table.encoded(rows, kind)
  contenders = {
    name: _bag(table, slots, weight) for name, table in tables.items()
  }
  task = f'bag T={shape[0]} k={shape[1]} W={options.width}'
  yield from _records(
    task, contenders, options, {n: x.nbytes for n, x in tables.items()}
  )


def _bag(table, slots, weight):
  program = jax.jit(value_bag).lower(table, slots[0], weight).compile()
  turns = itertools.cycle(slots)
  return measuring.Contender(
    lambda: program(table, next(turns), weight),
    temp_bytes=program.memory_analysis().temp_size_in_bytes,
  )


def _products(options, batches):
  if not batches:
    return
  rng = np.random.default_rng(0)
  size = (options.size, options.size)
  matrix = jnp.asarray(rng.standard_normal(size, np.float32))
  forms = {'f32': matrix}
  for name, kind, group in (
    ('int8', 'int8', 64),
    ('int4, groups of 32', 'int4', 32),
    ('int4, groups of 64', 'int4', 64),
    ('nf4, groups of 64', 'nf4', 64),
  ):
    forms[name] = quantized_matrix.encoded(matrix, kind, (0,), group)
  for batch in batches:
    x = jnp.asarray(rng.standard_normal((batch, options.size), np.float32))
    contenders = {
      name: measuring.compiled(_product, x, form)
      for name, form in forms.items()
    }
    yield from _records(
      f'product B={batch} D={options.size}',
      contenders,
      options,
      {name: form.nbytes for name, form in forms.items()},
    )


def _product(x, matrix):
  return x @ (matrix if isinstance(matrix, jax.Array) else matrix.dequantized())


def _decoding(options, batches):
  if not batches:
    return
  own = {n: getattr(options, n) for n in ('layers', 'mlp_dim', 'growth')}
  own |= dict(model_dim=options.model_dim, context=options.context, heads=4)
  own |= dict(models='ultramem', steps=1, rounds=options.rounds)
  own = argparse.Namespace(**decode.OPTIONS | own)
  (model,) = decode_models.make_models(own, 1).values()
  params = decode_models.draw_params(model)
  forms = {n: quantize(model, params, parse(how)) for n, how in MODELS.items()}
  sizes = {n: sum(bytes_by_part(x).values()) for n, x in forms.items()}
  forms = {n: fold_for_decode(model, x) for n, x in forms.items()}
  for batch in batches:
    cell = Cell(dict.fromkeys(forms, model), forms, own, batch)
    seconds = cell.take_turns('uniform', least=True)
    task = f'decode step B={batch}'
    for found in cell.records(task, seconds):
      name = found['contender']
      kept = {k: found[k] for k in ('seconds', 'temp_bytes')}
      yield dict(task=task, contender=name, bytes=sizes[name]) | kept


def _records(task, contenders, options, sizes):
  found = measuring.compare(task, contenders, options.rounds, least=True)
  for record in found:
    yield record | dict(bytes=sizes[record['contender']])


def show(records: list[dict]) -> None:
  if len(records) == 1:
    print(
      f'{"task":<26}{"stored as":<22}{"time":>12}{"ratio":>8}{"bytes":>12}'
      f'{"temporaries":>13}'
    )
  r = records[-1]
  base = next(x['seconds'] for x in records if x['task'] == r['task'])
  print(
    f'{r["task"]:<26}{r["contender"]:<22}{r["seconds"] * 1e3:>9.3f} ms'
    f'{r["seconds"] / base:>7.2f}x{r["bytes"] / 1e6:>9.1f} MB'
    f'{r["temp_bytes"] / 1e6:>10.1f} MB'
  )


def _numbers(name, text):
  parts = [part for part in text.split(',') if part]
  require(
    all(part.isdigit() and int(part) > 0 for part in parts),
    f'{name} must be positive numbers with commas between, got {text!r}.',
  )
  return [int(part) for part in parts]
