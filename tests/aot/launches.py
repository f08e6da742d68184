# SPDX-License-Identifier: Apache-2.0
"""Reads a GPU's program: the kernels that it launches, and what they move.

A kernel is any instruction that the device runs: a fusion counts as one, and
what only names memory counts as none. Compiling ahead of time tunes nothing, so
a device may run a product as one kernel more or less.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_NO_KERNELS = {
  'after-all', 'bitcast', 'constant', 'get-tuple-element', 'opt-barrier',
  'parameter', 'partition-id', 'replica-id', 'tuple',
}  # fmt: skip
_READS_A_PART = {'gather', 'slice', 'dynamic-slice'}
# With the place of the part among the operands.
_WRITES_A_PART = {'dynamic-update-slice': 1, 'scatter': 2}
_TYPE = re.compile(r'\b([a-z]+\d*)\w*\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%([\w.\-]+) = (.*)$')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    opcode: of XLA.
    shape: of the result, as text.
    operands: names of the instructions that it reads; of a parameter its
      number.
    callees: names of the computations that it runs.
    scope: of the modules that it is from, as in 'block_01/mlp'.
    is_repeated: whether it is within a loop, for `kernels`.
  """

  opcode: str
  shape: str
  operands: tuple[str, ...]
  callees: tuple[str, ...]
  scope: str
  is_repeated: bool = False

  @property
  def nbytes(self) -> int:
    """Of the result."""
    return sum(
      math.ceil(_bits(kind) * math.prod(map(int, dims.split(','))) / 8)
      if dims
      else _bits(kind) // 8
      for kind, dims in _TYPE.findall(self.shape)
    )


Computations = Mapping[str, Mapping[str, Instruction]]


def kernels(hlo: str) -> list[Instruction]:
  """The kernels of an optimized program, those of loop bodies once."""
  computations, entry = _parse(hlo)
  return [x for _, x in _kernels(computations, entry)]


def repeated(hlo: str) -> list[Instruction]:
  """Those within its loops."""
  return [kernel for kernel in kernels(hlo) if kernel.is_repeated]


def written_before_loops(hlo: str) -> int:
  """Bytes that are written outside of loops: weights in another layout, say."""
  return sum(x.nbytes for x in kernels(hlo) if not x.is_repeated)


def written(
  found: Sequence[Instruction], least_bytes: int, *kept: tuple[int, ...]
) -> list[str]:
  """What kernels write of so many bytes or more, but for arrays in place.

  Args:
    found: the kernels.
    least_bytes: such as those of a weight.
    kept: shapes of arrays of which a kernel writes a part, such as a cache.
  """
  shapes = {','.join(map(str, shape)) for shape in kept}
  large = []
  for x in found:
    for kind, dims in _TYPE.findall(x.shape):
      one = dataclasses.replace(x, shape=f'{kind}[{dims}]')
      if one.nbytes >= least_bytes and dims not in shapes:
        large.append(f'{x.opcode} {one.shape} of {x.scope}')
  return large


def moved_in_loops(hlo: str, taken: Mapping[tuple[int, ...], int]) -> int:
  """Bytes that kernels within loops read and write in one round.

  Of what a fusion gathers, slices or writes a part of, only that part counts.

  Args:
    hlo: the optimized program.
    taken: what a kernel of our own reads of an array of that shape, bytes.
  """
  computations, entry = _parse(hlo)
  parts = {','.join(map(str, shape)): size for shape, size in taken.items()}
  total = 0
  for name, x in _kernels(computations, entry):
    if not x.is_repeated:
      continue
    inside = computations[x.callees[0]] if x.opcode == 'fusion' else None
    total += _written_by(inside) if inside else x.nbytes
    for number, operand in enumerate(x.operands):
      array = computations[name][operand]
      dims = _TYPE.findall(array.shape)[0][1]
      size = parts.get(dims, array.nbytes)
      if inside:
        size = min(size, _read_by(inside, number))
      total += size
  return total


def within(found: Sequence[Instruction], part: str) -> list[Instruction]:
  """Those whose scope has this part."""
  return [x for x in found if part in f'/{x.scope}/']


def graphs(hlo: str, thunks: str) -> int:
  """CUDA graphs that the loops of a program launch in each round.

  Args:
    hlo: the optimized program, where JAX before 0.11 has its graphs.
    thunks: what XLA runs, where later ones have them, see `targets.Program`.
  """
  if not thunks:
    computations, _ = _parse(hlo)
    bodies = {
      callee
      for computation in computations.values()
      for x in computation.values()
      if x.opcode == 'while'
      for callee in x.callees
    }
    calls = [
      x
      for name in bodies
      for x in computations[name].values()
      if x.opcode == 'call'
    ]
    return len(calls)
  return thunks.count('kCommandBuffer')


def _kernels(
  computations: Computations, name: str, is_repeated: bool = False
) -> Iterator[tuple[str, Instruction]]:
  """All kernels, and the names of the computations in which they are."""
  for x in computations[name].values():
    if x.opcode in _NO_KERNELS or x.opcode.endswith('-done'):
      continue
    if x.opcode in ('while', 'call', 'async-start', 'conditional'):
      for callee in x.callees:
        yield from _kernels(
          computations, callee, is_repeated or x.opcode == 'while'
        )
    else:
      yield name, dataclasses.replace(x, is_repeated=is_repeated)


def _read_by(inside: Mapping[str, Instruction], number: int) -> int:
  """Bytes that a fusion reads of one of its operands."""
  (name,) = [
    name
    for name, x in inside.items()
    if x.opcode == 'parameter' and x.operands == (str(number),)
  ]

  def of(name: str) -> int:
    total = 0
    for other, x in inside.items():
      if name not in x.operands or x.opcode == 'parameter':
        continue
      is_first = x.operands[0] == name
      if x.opcode == 'bitcast':
        total += of(other)
      elif is_first and x.opcode in _READS_A_PART:
        total += x.nbytes
      elif not (is_first and x.opcode in _WRITES_A_PART):
        return inside[name].nbytes
    return total

  return min(of(name), inside[name].nbytes)


def _written_by(inside: Mapping[str, Instruction]) -> int:
  """Bytes that a fusion writes."""

  def of(x: Instruction) -> int:
    if x.opcode in ('tuple', 'bitcast'):
      return sum(of(inside[name]) for name in x.operands)
    if x.opcode in _WRITES_A_PART:
      return inside[x.operands[_WRITES_A_PART[x.opcode]]].nbytes
    return x.nbytes

  # The root comes last.
  return of(list(inside.values())[-1])


def _parse(hlo: str) -> tuple[Computations, str]:
  computations, current, entry = {}, None, ''
  for line in hlo.split('\n'):
    if found := _COMPUTATION.match(line):
      current = computations.setdefault(found[2], {})
      entry = found[2] if found[1] else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current[found[1]] = _instruction(re.sub(r'/\*.*?\*/', '', found[2]))
  return computations, entry


def _instruction(text: str) -> Instruction:
  """Of 'TYPE OPCODE(OPERANDS), ATTRIBUTES'."""
  end = _end(text) if text[0] == '(' else text.index(' ')
  shape, rest = text[:end], text[end:].strip()
  begin = rest.index('(')
  end = begin + _end(rest[begin:])
  operands, attributes = rest[begin:end], rest[end:]
  callees = re.findall(
    r'(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)', attributes
  )
  for branches in re.findall(r'branch_computations=\{(.*?)\}', attributes):
    callees += re.findall(r'%([\w.\-]+)', branches)
  scope = re.search(r'op_name="([^"]*)"', attributes)
  return Instruction(
    rest[:begin],
    shape,
    tuple(re.findall(r'(?<=%)[\w.\-]+|(?<=^\()\d+(?=\)$)', operands)),
    tuple(callees),
    scope[1] if scope else '',
  )


def _end(text: str) -> int:
  """Where the parenthesis closes with which a text begins."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return i + 1
  raise ValueError(f'no end: {text[:80]}')


def _bits(kind: str) -> int:
  if kind == 'pred':
    return 8
  digits = re.sub(r'\D', '', kind)
  return int(digits) if digits else 0
