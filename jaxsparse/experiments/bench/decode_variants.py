# SPDX-License-Identifier: Apache-2.0
"""decode_variants: a decode step with one thing changed, beside it as it is.

In one process, in turns: the step of every model as generate and the server run
it takes its turns with each variant of it, whose rows have the time of both.
'to as_it_is' is the variant's time over that of the same rounds. A variant that
fails leaves out itself alone, and none is begun when --minutes are over.

as_it_was     one row at batch 1, parameters not folded, no kernel but those for
              attention and for sorted experts, selections that cut a GPU's
              graph (on JAX 0.11)
one_graph     as it was, but selections that leave the graph whole
two_rows      as it was, but two rows at batch 1
one_row       as it is, but one row at batch 1
plain         as it is, but parameters not folded
no_attend, no_retrieve, no_bag, no_few_experts
              as it is, but XLA's form of one kernel
pdl           kernels that may begin before the one before them has ended
while         the loop over steps in the graph
no_split_k    products whose sums are not split
cublaslt      cuBLASLt, which may add and activate

--autotune=FOLDER keeps what a GPU's autotuner has found for the steps as they
are; `results/autotune_NAME/` is read by the tests of `tests/aot`.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax

from jaxsparse.config.errors import require
from jaxsparse.experiments.bench import (
  decode,
  decode_models,
  measuring,
  switches,
)
from jaxsparse.experiments.bench.decode_cell import Cell
from jaxsparse.inference.fold import fold_for_decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """What is changed of a step.

  Attributes:
    compiler_options: of XLA.
    without: kernels that are XLA's.
    cuts_graphs: see `switches.without`.
    is_folded: whether parameters are folded for decoding.
    least_rows: as the decode bench has it.
  """

  compiler_options: str = ''
  without: tuple[str, ...] = ()
  cuts_graphs: bool = False
  is_folded: bool = True
  least_rows: int = 0

  @property
  def is_traced_alike(self) -> bool:
    """Whether it differs from a step as it is by options of XLA only."""
    return self == Variant(compiler_options=self.compiler_options)


# What JAX captures in graphs by itself, and loops.
_IN_GRAPHS = 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE'

_AS_IT_WAS = Variant(
  without=tuple(switches.KERNELS),
  cuts_graphs=True,
  is_folded=False,
  least_rows=1,
)

VARIANTS = dict(
  as_it_was=_AS_IT_WAS,
  pdl=Variant(compiler_options='xla_gpu_enable_pdl=true'),
  one_graph=dataclasses.replace(_AS_IT_WAS, cuts_graphs=False),
  two_rows=dataclasses.replace(_AS_IT_WAS, least_rows=2),
  one_row=Variant(least_rows=1),
  plain=Variant(is_folded=False),
  **{f'no_{name}': Variant(without=(name,)) for name in switches.KERNELS},
  no_split_k=Variant(compiler_options='xla_gpu_experimental_force_split_k=1'),
  cublaslt=Variant(compiler_options='xla_gpu_enable_cublaslt=true'),
  **{
    'while': Variant(
      compiler_options=f'xla_gpu_enable_command_buffer={_IN_GRAPHS}'
    )
  },
)

OPTIONS = decode.OPTIONS | dict(variants=','.join(VARIANTS), minutes=60.0)


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of all variants, batch by batch.

  Raises:
    UserError: an option has no sense.
  """
  end = time.monotonic() + 60 * options.minutes
  decode.check(options)
  names = options.variants.split(',')
  require(
    set(names) <= set(VARIANTS),
    f'variants must be some of {", ".join(VARIANTS)}; got '
    f'{options.variants!r}.',
  )
  if options.autotune:
    pathlib.Path(options.autotune).mkdir(parents=True, exist_ok=True)
  for group in decode.numbers(options, 'kv_groups'):
    models = decode_models.make_models(options, group)
    plain = {n: decode_models.draw_params(m) for n, m in models.items()}
    folded = {
      # Of dicts of its own: parameters are taken out of what is given.
      name: fold_for_decode(model, jax.tree.map(lambda x: x, plain[name]))
      for name, model in models.items()
    }
    for batch_size in decode.numbers(options, 'batches'):
      task = f'KV /{group}, batch {batch_size}'
      if not decode.fits(models, folded, options, batch_size):
        print(f'{task}: left out, it does not fit on the device.', flush=True)
      elif time.monotonic() > end:
        print(f'{task}: left out, the minutes are over.', flush=True)
      else:
        yield from _batch(
          models, plain, folded, options, batch_size, names, task, end
        )


def _batch(models, plain, folded, options, batch_size, names, task, end):
  base = Cell(models, folded, options, batch_size)
  changed_rows = 'one_row', 'two_rows'
  for name in names:
    variant = VARIANTS[name]
    if name in changed_rows and batch_size > 1:
      continue
    if time.monotonic() > end:
      print(f'{task}, {name}: left out, the minutes are over.', flush=True)
      continue
    try:
      rows = _variant(
        base, models, plain, folded, options, batch_size, variant, task, name
      )
    except Exception as error:
      rows = [dict(task=task, variant=name, error=_in_words(error))]
    yield from rows


def _variant(
  base, models, plain, folded, options, batch_size, variant, task, name
):
  changed = dict(
    compiler_options=variant.compiler_options,
    least_rows=variant.least_rows,
    autotune='',
  )
  options = argparse.Namespace(**vars(options) | changed)
  params = folded if variant.is_folded else plain
  with switches.without(*variant.without, cuts_graphs=variant.cuts_graphs):
    cell = Cell(
      models,
      params,
      options,
      batch_size,
      base.lowered if variant.is_traced_alike else None,
    )
  contenders = {
    (which, model): contender
    for which, one in (('as_it_is', base), (name, cell))
    for model, contender in one.contenders('uniform').items()
  }
  seconds = measuring.take_turns(contenders, options.rounds)
  rows = []
  for which, one in (('as_it_is', base), (name, cell)):
    own = {model: seconds[which, model] for model in models}
    rows += [
      record
      | dict(
        variant=which,
        beside=name,
        to_as_it_is=seconds[which, model] / seconds['as_it_is', model],
      )
      for model, record in zip(models, one.records(task, own), strict=True)
    ]
  return rows


def _in_words(error):
  return f'{type(error).__name__}: {error}'.split('\n')[0]


def show(records: Sequence[dict]) -> None:
  if len(records) == 1:
    print(
      f'{"task":<18}{"variant":<16}{"model":<10}{"step":>12}'
      f'{"to as_it_is":>13}{"to dense":>10}{"MoE to it":>11}{"of copy":>9}'
      f'{"temporaries":>13}'
    )
  r = records[-1]
  line = f'{r["task"]:<18}{r["variant"]:<16}'
  if 'error' in r:
    print(f'{line}{r["error"]}')
    return
  line += f'{r["contender"]:<10}{r["seconds"] * 1e3:>9.3f} ms'
  for key, width in (('to_as_it_is', 12), ('to_dense', 9), ('moe_ratio', 10)):
    line += f'{r[key]:>{width}.2f}x' if key in r else ' ' * (width + 1)
  print(f'{line}{r["share_of_copy"]:>9.0%}{r["temp_bytes"] / 1e6:>10.1f} MB')
