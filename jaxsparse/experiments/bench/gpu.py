# SPDX-License-Identifier: Apache-2.0
"""gpu: what to do with a lent GPU, an item a command: `bench gpu ITEM`.

Every item prints device, versions, copy bandwidth and matmul rate, then its
rows; `--json=FILE` is whole after every row. Nothing is begun when --minutes
are over, counted from the start, and what fails leaves out itself alone: its
error is in the file, and the command ends with it. None needs a package for
data. Times are estimates for an H100; --sizes=toy goes through the same
programs on a CPU.

language, 8 minutes
  Dense, MoE, PKM and UltraMem by configs/compare/h100.py, then Memory+ and
  UltraMemV2 if minutes are left: equal FLOPs, 62.9M bytes each, the same
  batches and validation. --text=PATH is its text, plain or .gz; by default the
  sources of Python, which are read five times.
decode, 9 minutes
  Its kernels alone; a step of the 680M family as it was, as it is and with
  XLA's `xla_gpu_enable_pdl` at batch 64, 1, 16 and 256; then each other change
  alone at 64 and 1, as far as minutes go, see `bench decode_variants --help`.
  --autotune=FOLDER keeps what the autotuner found.
rows, 6 minutes
  The bag, and a decode step of the 680M UltraMem, by the type of its table.
attention, 6 minutes
  Sparse attention, forward and decode, at 8k, 32k and 128k beside cuDNN, and a
  train step with composed heads beside cuDNN's with plain ones.
all, 9 minutes
  `bench all`, as far as it comes.

To come, when there is a server: its throughput and first token under load.
"""

import math
import time
from types import ModuleType

from jaxsparse.config.errors import UserError
from jaxsparse.config.tables import TABLE_TYPES
from jaxsparse.experiments.bench import (
  all_benches,
  attention,
  decode,
  decode_kernels,
  decode_variants,
  grouped_matmul,
  language,
  long_input,
  memory_layer,
  top_m,
  train_step,
  value_bag,
)
from jaxsparse.experiments.bench.report import Report

# Title, bench, and the options of each of its runs.
Section = tuple[str, ModuleType, list[dict]]

ITEMS = ('language', 'decode', 'rows', 'attention', 'all')

OPTIONS = dict(
  minutes=9.0,
  # Of 'language'.
  text='',
  models=language.OPTIONS['models'],
  # Of 'decode'.
  autotune='',
  # 'gpu', or 'toy' to rehearse on a CPU.
  sizes='gpu',
)

# Two sparse models of 18 GB and a cache of 0.8 GB fit on 80 GB. More models or
# batches would not fit in the minutes: each cell compiles for half of one.
_DECODE = dict(
  family='680m',
  models='dense,moe,ultramem',
  batches='1,64',
  kv_groups='8',
  dtype='bfloat16',
  context=2048,
  steps=32,
  width_multiple=64,
  rounds=3,
  # A ratio beyond its limit is a result here.
  margin=1e9,
)
_ATTENTION = dict(
  heads=16, chunk=1024, dtype='bfloat16', train_length=0, rounds=3
)

_TOY_STEP = dict(
  family='own', batches='1', kv_groups='2', context=8, steps=2, rounds=1,
  model_dim=32, layers=3, heads=2, mlp_dim=128, vocab=64, growth=4,
  selected=4, width_multiple=1, routing='uniform', models='dense,ultramem',
  dtype='float32',
)  # fmt: skip

# Instead of the sizes of an item, by bench.
_TOY = {
  attention: dict(
    lengths='32', context=32, train_length=16, heads=2, kv_heads=1, width=8,
    block=8, tile=8, window_blocks=1, kept_blocks=2, chunk=16, model_dim=16,
    train_chunk=8, dtype='float32', rounds=1,
  ),
  decode: _TOY_STEP,
  decode_kernels: dict(
    batches='2', rounds=1, calls=2, dtype='float32', keys=24, selected=4,
    rows=64, width=64, query_heads=4, head_dim=16, context=32,
  ),
  decode_variants: _TOY_STEP,
  grouped_matmul: dict(experts=2, depth=8, width=8, rows=4, rounds=1),
  language: dict(suite='cpu', steps=2),
  long_input: dict(tokens=1100, stretch=512),
  memory_layer: dict(
    tokens=6, model_dim=8, num_keys=8, key_dim=4, num_selected=4, value_dim=6,
    rounds=1,
  ),
  top_m: dict(tokens=4, scores=16, selected=4, rounds=1),
  train_step: dict(
    config='', optimizers='adamw', tokens=4, seq_len=4, num_keys=8, growth=1,
    rounds=1,
  ),
  value_bag: dict(rows=64, tokens=4, width=8, entries=4, rounds=1),
}  # fmt: skip


def sections(item: str, options: dict) -> list[Section]:
  """What an item measures.

  Args:
    item: one of `ITEMS`.
    options: those of `OPTIONS`.

  Raises:
    UserError: there are no such sizes.
  """
  if options['sizes'] not in ('gpu', 'toy'):
    raise UserError(f'--sizes must be gpu or toy, got {options["sizes"]!r}.')
  found = dict(
    language=_language, decode=_decode, rows=_rows, attention=_attention,
    all=lambda _: all_benches.sections(on_cpu=False),
  )[item](options)  # fmt: skip
  if options['sizes'] == 'gpu':
    return found
  return [
    (title, bench, [changes | _TOY.get(bench, {}) for changes in runs])
    for title, bench, runs in found
  ]


def _language(options):
  kept = {name: options[name] for name in ('text', 'models', 'minutes')}
  return [('language', language, [kept])]


def _decode(options):
  steps = _DECODE | dict(minutes=options['minutes'])
  first = ['as_it_was', 'pdl']
  others = [name for name in decode_variants.VARIANTS if name not in first]
  return [
    ('kernels alone', decode_kernels, [{}]),
    (
      'steps',
      decode_variants,
      [
        steps
        | dict(
          batches='64,1,16,256',
          variants=','.join(first),
          autotune=options['autotune'],
        )
      ],
    ),
    (
      'changes alone',
      decode_variants,
      [steps | dict(batches='64,1', variants=','.join(others))],
    ),
  ]


def _rows(options):
  # A row as wide as those of the 680M UltraMem.
  bag = dict(rows=2**20, width=768, entries=84)
  return [
    (
      'bag',
      value_bag,
      [
        bag | dict(tokens=tokens, dtype=dtype)
        for tokens in (64, 4096)
        for dtype in TABLE_TYPES
      ],
    ),
    (
      'decode step',
      decode,
      [
        _DECODE | dict(models='dense,ultramem', table_dtype=dtype)
        for dtype in TABLE_TYPES
      ],
    ),
  ]


def _attention(options):
  runs = [
    _ATTENTION | dict(lengths=str(length), context=length)
    for length in (8192, 32_768, 131_072)
  ]
  train = _ATTENTION | dict(lengths='', context=0, train_length=2048)
  return [('sparse', attention, runs), ('composed heads', attention, [train])]


def run(
  found: list[Section], report: Report, minutes: float, start: float
) -> None:
  """Measures sections until the minutes since `start` are over.

  Args:
    found: what to measure.
    report: gets 'sections', by title.
    minutes: since `start`, after which nothing is begun.
    start: of `time.monotonic`.

  Raises:
    UserError: something failed; all else was measured.
  """
  report.content['sections'] = kept = {}
  failed = []
  for title, bench, runs in found:
    kept[title] = []
    for changes in runs:
      left = minutes - (time.monotonic() - start) / 60
      if left <= 0:
        print(f'\n{title}: left out, the {minutes:g} minutes are over.')
        continue
      shown = '' if math.isinf(left) else f' ({left:.1f} minutes left)'
      print(f'\n{title}: {changes}{shown}', flush=True)
      if 'minutes' in changes:
        changes = changes | dict(minutes=left)
      one = dict(arguments=bench.OPTIONS | changes, results=[])
      kept[title].append(one)
      try:
        report.add(bench, one['arguments'], one['results'])
      except Exception as error:
        one['error'] = f'{type(error).__name__}: {error}'
        failed.append(title)
        print(f'{title} failed: {one["error"].splitlines()[0]}', flush=True)
        report.write()
  if failed:
    raise UserError(f'failed: {", ".join(failed)}; all else was measured.')
