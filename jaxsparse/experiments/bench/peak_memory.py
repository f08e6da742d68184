# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a process that runs one contender of a bench alone.

  python -m jaxsparse.experiments.bench.peak_memory CONTENDER --tokens=...

Prints bytes; `memory_layer` starts it once for each contender.
"""

import argparse
import resource
import sys
from collections.abc import Sequence

from jaxsparse.experiments.bench import memory_layer


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='jaxsparse.experiments.bench.peak_memory'
  )
  parser.add_argument('contender', choices=memory_layer.contenders())
  for name, default in memory_layer.OPTIONS.items():
    parser.add_argument(f'--{name}', type=int, default=default)
  options = parser.parse_args(argv)
  problem = memory_layer.make_problem(options)
  backward = memory_layer.contenders()[options.contender](problem)['backward']
  backward.wait(backward.run())
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == '__main__':
  main(sys.argv[1:])
