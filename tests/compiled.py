# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does, read from its text: `compiled.as_text()`.

Works on the programs of all backends, whose texts differ: the same transfer is
one instruction on CPU, a pair of `-start` and `-done` on GPU and TPU, a fusion
on TPU, and several arrays may share one instruction.
"""

import math
import re
from typing import NamedTuple

_COLLECTIVES = (
  'all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute'
  '|ragged-all-to-all|reduce-scatter'
)
_INSTRUCTION = re.compile(
  rf'^\s*(?:ROOT )?%?\S+ = (.*?) ({_COLLECTIVES})(-start)?\('
)
# Every device by itself: some backends keep such transfers, which move nothing.
_ALONE = re.compile(r'replica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\]<=)')
_NAMED = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?(\S+) \(.*\{$')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CALL = re.compile(r'^\s*(?:ROOT )?%?\S+ = (.*?) fusion\(.*calls=%?([\w.\-]+)')
_ARRAY = re.compile(r'\b([a-z]\w*\[[\d,]*\])')
_LAYOUT = re.compile(r'\{[^{}]*\}')


class Collective(NamedTuple):
  """A transfer between devices, and what one device receives by it."""

  op: str  # 'all-gather', without '-start'
  shapes: tuple[str, ...]  # its results on a device: ('s32[16,4]',)


class Payload(NamedTuple):
  """What one device holds after a transfer: an array, shaped as may be."""

  op: str
  dtype: str
  size: int  # in elements


def collectives(text: str) -> list[Collective]:
  """All collectives of a compiled program, sorted.

  An instruction counts once, wherever it is, in a loop's body too; and so do
  the instructions into which a TPU splits one that overlaps with others.
  """
  found = []
  chains = set()
  computation = ''
  reduce_scatters = {}
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      computation = start[1]
    elif (match := _INSTRUCTION.match(line)) and not _is_alone(line):
      result, op, is_start = match.groups()
      chain = _CHAIN.search(line)
      if chain and (op, chain[1]) in chains:
        continue
      chains |= {(op, chain[1])} if chain else set()
      found.append((computation, op, _results(result, op, bool(is_start))))
    elif match := _CALL.match(line):
      reduce_scatters[match[2]] = _results(match[1], 'fusion', False)
  return sorted(
    # A TPU's reduce-scatter is a fusion of an all-reduce and a slice of it.
    Collective('reduce-scatter', reduce_scatters[where])
    if where.startswith('all-reduce-scatter') and where in reduce_scatters
    else Collective(op, shapes)
    for where, op, shapes in found
  )


def payloads(text: str) -> list[Payload]:
  """`collectives`, by the arrays that they move and told apart by size only.

  This is the same on all backends: whether two arrays share an instruction,
  and whether an all-to-all gives one array or a tuple of pieces, is not.
  """
  moved = []
  for op, shapes in collectives(text):
    arrays = map(_dtype_and_size, shapes)
    if op == 'all-to-all':
      pieces = list(arrays)
      sizes = {dtype: 0 for dtype, _ in pieces}
      for dtype, size in pieces:
        sizes[dtype] += size
      arrays = sizes.items()
    moved += [Payload(op, *array) for array in arrays]
  return sorted(moved)


def arrays_of_size(text: str, op: str, size: int) -> list[str]:
  """Results of instructions `op` with `size` elements or more."""
  results = re.findall(rf'= (\S+?\[[\d,]*\])\S* {re.escape(op)}\(', text)
  return [shape for shape in results if _dtype_and_size(shape)[1] >= size]


def _is_alone(line: str) -> bool:
  """Whether every device of a transfer is by itself."""
  if named := _NAMED.search(line):
    sizes = dict(axis.split('=') for axis in named[1].split(','))
    return all(sizes[axis] == '1' for axis in named[2].split(','))
  return bool(_ALONE.search(line))


def _results(result: str, op: str, is_start: bool) -> tuple[str, ...]:
  """Shapes in an instruction's type; without the operands that -start lists."""
  while _LAYOUT.search(result):
    result = _LAYOUT.sub('', result)
  if is_start and op != 'all-reduce':
    result = _split(result)[1]
  return tuple(_ARRAY.findall(result))


def _split(tuple_type: str) -> list[str]:
  """'((a, b), c)' to ['(a, b)', 'c']."""
  depth, parts = 0, ['']
  for character in tuple_type:
    depth += (character in '([') - (character in ')]')
    if character == ',' and depth == 1:
      parts.append('')
    else:
      parts[-1] += character
  return parts


def _dtype_and_size(shape: str) -> tuple[str, int]:
  dtype, dims = shape.rstrip(']').split('[')
  return dtype, math.prod(int(dim) for dim in dims.split(',') if dim)
