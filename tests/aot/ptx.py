# SPDX-License-Identifier: Apache-2.0
"""Reads GPU kernels: which instructions they have, which addresses they form.

`accesses` runs one thread of a kernel, integers only, so an address that has
overflowed on its way shows as the wrong number, whatever the types of the
instructions that formed it.
"""

import importlib.util
import pathlib
import re
import subprocess

_KERNEL = re.compile(
  r'\.entry (\w+)\((.*?)\)\s*(?:\.\w+ [^{]*)?\{(.*?)\n\}', re.S
)
_POINTER_BITS = 44
_MAX_STEPS = 100_000


def atomics(ptx: str) -> set[str]:
  """Distinct atomic instructions on global memory, with type and width."""
  return set(re.findall(r'\b(?:atom|red)\.\S*global\S*', ptx))


def loads(ptx: str) -> set[str]:
  return set(re.findall(r'\bld\.global\S*', ptx))


def spilled_bytes(ptx: str, folder: pathlib.Path) -> int:
  """Bytes that kernels for an H100 keep in memory for want of registers.

  Args:
    ptx: of several modules, one after the other.
    folder: to write them to, for NVIDIA's assembler.
  """
  package = importlib.util.find_spec('nvidia.cuda_nvcc')
  assert package is not None
  (root,) = package.submodule_search_locations
  total = 0
  for i, module in enumerate(re.split(r'(?m)^(?=\.version)', ptx)[1:]):
    path = folder / f'{i}_to_assemble'
    path.write_text(module)
    report = subprocess.run(
      [f'{root}/bin/ptxas', '-v', '-arch=sm_90a', path, '-o', '/dev/null'],
      capture_output=True,
      check=True,
      text=True,
    ).stderr
    spills = re.findall(r'(\d+) bytes spill', report)
    assert spills, report
    total += sum(map(int, spills))
  return total


def accesses(
  ptx: str, loaded: int, block: int, thread: int
) -> list[tuple[int, int]]:
  """Global accesses of one thread of each kernel, in program order.

  Args:
    ptx: text of one or more kernels.
    loaded: what every load from memory gives.
    block: index of the thread's block.
    thread: index of the thread in it.

  Returns:
    Pairs of a number that stands for kernel and argument, and the offset in
    bytes into what that argument points to.
  """
  found = []
  for kernel, (_, params, body) in enumerate(_KERNEL.findall(ptx)):
    names = re.findall(r'(\w+)(?:,|$|\n)', params)
    first = 1 + 64 * kernel
    pointers = {
      name: (first + i) << _POINTER_BITS for i, name in enumerate(names)
    }
    found += _run(body, pointers, loaded, block, thread)
  return [
    (address >> _POINTER_BITS, address % (1 << _POINTER_BITS))
    for address in found
  ]


def _run(body, pointers, loaded, block, thread):
  lines = [line.split('//')[0].strip() for line in body.split('\n')]
  lines = [line for line in lines if line and line[0] not in '.{}']
  labels = {x[:-1]: i for i, x in enumerate(lines) if x.endswith(':')}
  values = {'%tid.x': thread, '%ctaid.x': block, '%tid.y': 0, '%ctaid.y': 0}
  found = []
  at = 0
  for _ in range(_MAX_STEPS):
    line = lines[at].rstrip(';')
    at += 1
    if line.endswith(':'):
      continue
    guard = re.match(r'@(!?)(%p\d+)\s+', line)
    if guard:
      line = line[guard.end() :]
      if bool(values[guard[2]]) == bool(guard[1]):
        continue
    opcode, _, rest = line.partition(' ')
    opcode, operands = opcode.strip(), _operands(opcode + ' ' + rest)
    if opcode == 'ret':
      return found
    if opcode.startswith('bra'):
      at = labels[operands[0]]
    elif re.match(r'(ld|st|atom|red)\.(\w+\.)*global', opcode):
      found.append(_address(line, values))
      if opcode.startswith('ld'):
        values |= {name: loaded for name in operands if '[' not in name}
    elif opcode.startswith('ld.param'):
      name = re.search(r'\[(\w+)', line)[1]
      values[operands[0]] = pointers[name]
    elif operands:
      values[operands[0]] = _result(
        opcode, [_value(x, values) for x in operands[1:]]
      )
  raise AssertionError('the kernel does not end')


def _operands(line):
  return re.findall(
    r'\[[^\]]*\]|%\w+(?:\.\w+)?|\$?\w*-?\w+', line.partition(' ')[2]
  )


def _value(operand, values):
  if operand[0] in '%':
    return values.get(operand)
  return int(operand, 0) if re.fullmatch(r'-?\d+|0x\w+', operand) else None


def _address(line, values):
  base, offset = re.search(r'\[(%\w+)\+?(-?\d+)?\]', line).groups()
  return (values[base] + int(offset or 0)) % (1 << 64)


def _result(opcode, x):
  """Of an integer instruction; None where a float is involved."""
  name, *_, kind = opcode.split('.')
  bits = int(re.sub(r'\D', '', kind) or 1)
  is_integer = not re.search(r'\.b?f\d', opcode) and name in _INTEGER
  if not is_integer or None in x:
    return None
  if '.wide' in opcode:
    x = [_wrap(v, bits, kind) for v in x[:2]] + x[2:]
    return _wrap(_INTEGER[name](opcode, *x), 64, kind)
  if name == 'cvt':
    source = opcode.split('.')[-1]
    x = [_wrap(x[0], int(source[1:]), source)]
    kind = opcode.split('.')[-2]
    bits = int(kind[1:])
  elif name in ('shl', 'shr'):
    x = [_wrap(x[0], bits, kind), x[1]]
  elif name != 'selp':
    x = [_wrap(v, bits, kind) for v in x]
  return _wrap(_INTEGER[name](opcode, *x), bits, kind)


def _wrap(value, bits, kind):
  value %= 1 << bits
  if kind[0] == 's' and value >> (bits - 1):
    value -= 1 << bits
  return value


def _compare(opcode, a, b):
  how = opcode.split('.')[1]
  return dict(
    eq=a == b, ne=a != b, lt=a < b, le=a <= b, gt=a > b, ge=a >= b,
    lo=a < b, ls=a <= b, hi=a > b, hs=a >= b,
  )[how]  # fmt: skip


_INTEGER = {
  'mov': lambda _, a: a,
  'cvta': lambda _, a: a,
  'cvt': lambda _, a: a,
  'add': lambda _, a, b: a + b,
  'sub': lambda _, a, b: a - b,
  'mul': lambda op, a, b: a * b >> 32 if '.hi' in op else a * b,
  'mad': lambda _, a, b, c: a * b + c,
  'div': lambda _, a, b: a // b,
  'rem': lambda _, a, b: a % b,
  'shl': lambda _, a, b: a << b,
  'shr': lambda _, a, b: a >> b,
  'and': lambda _, a, b: a & b,
  'or': lambda _, a, b: a | b,
  'xor': lambda _, a, b: a ^ b,
  'not': lambda _, a: ~a,
  'min': lambda _, a, b: min(a, b),
  'max': lambda _, a, b: max(a, b),
  'selp': lambda _, a, b, p: a if p else b,
  'setp': _compare,
}
