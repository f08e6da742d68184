# SPDX-License-Identifier: Apache-2.0
"""How fast and how large: `python -m jaxsparse bench NAME`.

Prints the machine, then a table, row by row; `--json=FILE` keeps both and is
whole after every row. `all` runs every bench with sizes for the backend at
hand, and `gpu ITEM` what is to be measured on a lent GPU. `NAME --help` lists
the options.
"""

import argparse
import math
import time
from collections.abc import Sequence

from jaxsparse.config.errors import require
from jaxsparse.experiments.bench import (
  all_benches,
  attention,
  decode,
  decode_kernels,
  decode_variants,
  gpu,
  grouped_matmul,
  host_memory,
  long_input,
  measuring,
  memory_layer,
  quantized,
  quantized_loss,
  serve,
  serve_ratios,
  tables,
  top_m,
  train,
  train_step,
  value_bag,
)
from jaxsparse.experiments.bench.report import Report
from jaxsparse.run.command_line import Parser

BENCHES = dict(
  value_bag=value_bag,
  grouped_matmul=grouped_matmul,
  top_m=top_m,
  memory_layer=memory_layer,
  train=train,
  train_step=train_step,
  attention=attention,
  decode=decode,
  decode_kernels=decode_kernels,
  decode_variants=decode_variants,
  long_input=long_input,
  host_memory=host_memory,
  quantized=quantized,
  quantized_loss=quantized_loss,
  serve=serve,
  serve_ratios=serve_ratios,
  tables=tables,
)


def main(argv: Sequence[str]) -> None:
  start = time.monotonic()
  options = vars(_parse(argv))
  name, path = options.pop('bench'), options.pop('json')
  require(
    options.get('rounds', 1) > 0,
    f'--rounds must be at least 1, got {options.get("rounds")}.',
  )
  # What is wrong is refused before hours of measuring.
  if name == 'gpu':
    found = gpu.sections(options['item'], options)
  elif name == 'all':
    found = all_benches.sections()
  report = Report(path, {})
  machine = measuring.describe_machine()
  print(*machine, sep='\n', flush=True)
  report.content |= dict(machine=machine)
  if name in ('all', 'gpu'):
    report.content |= dict(arguments=dict(bench=name) | options)
    gpu.run(found, report, options.get('minutes', math.inf), start)
  else:
    results = []
    report.content |= dict(
      arguments=dict(bench=name) | options, results=results
    )
    report.add(BENCHES[name], options, results)
  report.write()  # Of a bench without rows, too.


def _parse(argv):
  parser = Parser(
    prog='jaxsparse bench',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  names = parser.add_subparsers(dest='bench', required=True)
  for name, bench in (BENCHES | dict(all=all_benches, gpu=gpu)).items():
    one = names.add_parser(
      name,
      description=bench.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name == 'gpu':
      one.add_argument('item', choices=gpu.ITEMS)
    one.add_argument('--json', default='', help='file for the results')
    for option, default in getattr(bench, 'OPTIONS', {}).items():
      one.add_argument(
        f'--{option}',
        type=type(default),
        default=default,
        help=f'{default!r} by default',
      )
  return parser.parse_args(argv)
