# SPDX-License-Identifier: Apache-2.0
"""Adapters in files: jaxsparse adapters list|inspect|merge|add|remove."""

import argparse
from collections.abc import Sequence

import numpy as np
from etils import epath

from jaxsparse.analysis.free_memory import words
from jaxsparse.cli import adapters_in_workdirs
from jaxsparse.config.errors import UserError, did_you_mean, require, shown
from jaxsparse.nn import row_deltas
from jaxsparse.ops.tables import row_delta
from jaxsparse.run import adapter_files, new_workdir
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser


def list_adapters(argv: Sequence[str]) -> None:
  """Those of a run, and those whose rows were added to a workdir."""
  parser = _parser('list', 'Say which adapters a workdir has.')
  parser.add_argument('workdir', help='of a run with an adapter')
  workdir = workdir_lib.expanded(parser.parse_args(argv).workdir)
  workdir_lib.require_reachable(workdir)
  found = adapter_files.names(workdir)
  added = adapters_in_workdirs.added(workdir)
  require(
    bool(found or added),
    f'workdir {workdir!r} has no adapters: train one by '
    "--config.adapter.kind='lora' or 'rows'.",
  )
  for name in found:
    print(_line(name, adapter_files.folder_of(workdir, name)))
  for name in added:
    print(f'{name}: rows, added to the tables')


def _line(name: str, folder: epath.Path) -> str:
  tensors, meta = adapter_files.read(folder)
  size = words(sum(x.nbytes for x in tensors.values()))
  return (
    f'{name}: {meta["kind"]}, {_contents(meta["kind"], tensors)}, {size}, '
    f'beside {meta["base"][:12]}'
  )


def _contents(kind: str, tensors: adapter_files.Tensors) -> str:
  if kind == 'rows':
    names = [name for name in tensors if name.endswith('/rows')]
    rows = sum(len(tensors[name]) for name in names)
    return f'{rows:,} rows of {len(names)} tables'
  matrices = {name.rpartition('/')[0] for name in tensors}
  return f'{len(matrices)} matrices'


def inspect(argv: Sequence[str]) -> None:
  """What adapters hold, and which rows several of them change."""
  parser = _parser(
    'inspect', 'Say what adapters hold, and where several overlap.'
  )
  parser.add_argument('adapters', nargs='+', help='RUN/adapters/NAME')
  deltas = []
  for folder in map(workdir_lib.expanded, parser.parse_args(argv).adapters):
    tensors, meta = adapter_files.read(folder)
    print(_line(folder, epath.Path(folder)))
    for name in sorted(set(meta) - {'format', 'kind', 'base', 'sha256'}):
      print(f'  {name}: {meta[name]}')
    if meta['kind'] == 'rows':
      for line in _tables(tensors):
        print(line)
      deltas.append(row_deltas.unchecked(tensors))
  if len(deltas) > 1:
    for line in row_deltas.overlap_lines(deltas):
      print(line)


def _tables(tensors: adapter_files.Tensors) -> list[str]:
  lines = [
    f'  {name.removesuffix("/rows")}: {len(rows):,} rows, {rows[0]} to '
    f'{rows[-1]}, of {tensors[name.removesuffix("rows") + "values"].dtype}'
    for name, rows in tensors.items()
    if name.endswith('/rows') and len(rows)
  ]
  if any(name.endswith('/old_norm') for name in tensors):
    share = row_deltas.changed_share(tensors)
    lines.append(f'  {share:.1%} of the rows changed by over 1% of their norm')
  return lines


def merge(argv: Sequence[str]) -> None:
  """Several deltas of rows as one, or one of them in fewer bits."""
  parser = _parser(
    'merge',
    'Make one delta of rows of several, of the same base, or of one with '
    'values of another type.',
  )
  parser.add_argument('adapters', nargs='+', help='RUN/adapters/NAME')
  parser.add_argument('--out', required=True, help='folder of the new one')
  parser.add_argument(
    '--values',
    default='',
    choices=('float32', 'bfloat16', 'int8'),
    help='type of the differences in the file; by default the widest of them',
  )
  arguments = parser.parse_args(argv)
  out = workdir_lib.expanded(arguments.out)
  folders = [workdir_lib.expanded(folder) for folder in arguments.adapters]
  adapter_files.require_distinct(folders)
  read = [adapters_in_workdirs.read_rows(folder) for folder in folders]
  bases = {meta['base'] for _, meta in read}
  require(
    len(bases) == 1,
    'adapters that are merged must be of one base, got those of '
    f'{len(bases)}: {", ".join(sorted(base[:12] for base in bases))}.',
  )
  new_workdir.require_new(out, '--out')
  deltas = [row_deltas.unchecked(tensors) for tensors, _ in read]
  for line in row_deltas.overlap_lines(deltas):
    print(line)
  joined, _ = row_deltas.summed(deltas)
  tensors = {}
  for path, (rows, values) in joined.items():
    # As wide as the widest of those that it is made of.
    types = [d[path][1].dtype for d in deltas if path in d]
    widest = max(types, key=lambda dtype: dtype.itemsize)
    tensors[f'{path}/rows'] = rows
    kept = dict(values=values.astype(arguments.values or widest))
    if arguments.values == 'int8':
      kept = row_delta.in_int8(values)
    norms = _old_norms([own for own, _ in read], path, rows)
    if norms is not None:
      kept['old_norm'] = norms
    tensors |= {f'{path}/{name}': x for name, x in kept.items()}
  meta = dict(kind='rows', base=bases.pop(), merged=list(arguments.adapters))
  adapter_files.write(out, tensors, meta)
  print(_line(out, epath.Path(out)))


def _old_norms(
  files: Sequence[adapter_files.Tensors], path: str, rows: np.ndarray
) -> np.ndarray | None:
  """Those of rows before, of files of one base; None if one is unknown."""
  norms = np.full(len(rows), np.nan, np.float32)
  for tensors in files:
    if f'{path}/old_norm' in tensors:
      places = np.searchsorted(rows, tensors[f'{path}/rows'])
      norms[places] = tensors[f'{path}/old_norm']
  return None if np.isnan(norms).any() else norms


# Each with what it does.
ACTIONS = dict(
  list=(list_adapters, 'say which adapters a workdir has'),
  inspect=(inspect, 'say what adapters hold, and where several overlap'),
  merge=(merge, 'make one delta of rows of several'),
  add=(
    adapters_in_workdirs.add,
    "write a delta's rows into the tables of a new workdir",
  ),
  remove=(
    adapters_in_workdirs.remove,
    'put the rows back that were there before, to the bit',
  ),
)


def main(argv: Sequence[str]) -> None:
  """Runs the action that the arguments begin with.

  Raises:
    UserError: there is no such action, or one of its flags is wrong.
  """
  if not argv or argv[0] in ('-h', '--help'):
    lines = ['usage: jaxsparse adapters ACTION ...', '']
    lines += [f'  {name:<10}{what}' for name, (_, what) in ACTIONS.items()]
    print('\n'.join([*lines, '', '`jaxsparse adapters ACTION --help` says '
                     'more.']))  # fmt: skip
    return
  name, *rest = argv
  if name not in ACTIONS:
    raise UserError(
      f'there is no action {shown(name)}{did_you_mean(name, ACTIONS)}; there '
      f'are {", ".join(ACTIONS)}.'
    )
  ACTIONS[name][0](rest)


def _parser(action: str, description: str) -> argparse.ArgumentParser:
  return Parser(prog=f'jaxsparse adapters {action}', description=description)
