# SPDX-License-Identifier: Apache-2.0
"""Deltas of rows in the tables of a workdir: added, and removed to the bit.

The workdir keeps the rows as they were, in `added/NAME`, so that what is
removed leaves no rounding behind. Both write a new workdir.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath

from jaxsparse.config.errors import require
from jaxsparse.data import tokenizer_roles
from jaxsparse.inference import adapters
from jaxsparse.nn import row_deltas
from jaxsparse.run import adapter_files, new_workdir, run_config, stored
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.adapter_files import Meta, Tensors
from jaxsparse.run.command_line import Parser

_FOLDER = 'added'


def added(workdir: str) -> list[str]:
  """Names of the deltas in the tables of a workdir, the first one first."""
  return [meta['name'] for _, meta in _read_added(workdir)]


def _read_added(workdir: str) -> list[tuple[Tensors, Meta]]:
  folder = epath.Path(workdir) / _FOLDER
  if not folder.exists():
    return []
  read = [adapter_files.read(path) for path in folder.iterdir()]
  return sorted(read, key=lambda of: of[1]['order'])


def read_rows(folder: str) -> tuple[Tensors, Meta]:
  """A delta of rows.

  Raises:
    UserError: there is none, or it is of another kind.
  """
  tensors, meta = adapter_files.read(folder)
  require(
    meta['kind'] == 'rows',
    f'the adapter in {folder!r} must be of rows, and is of the kind '
    f'{meta["kind"]!r}: let it stand beside its base (--adapter=).',
  )
  return tensors, meta


def add(argv: Sequence[str]) -> None:
  """Writes a workdir whose tables have the differences in them."""
  parser = Parser(
    prog='jaxsparse adapters add',
    description="Write a delta's rows into the tables of a new workdir.",
  )
  parser.add_argument('workdir', help='of the base')
  parser.add_argument('adapters', nargs='+', help='RUN/adapters/NAME')
  parser.add_argument('--out', required=True, help='folder of the new workdir')
  parser.add_argument(
    '--force', action='store_true', help='take deltas of another base, too'
  )
  arguments = parser.parse_args(argv)
  workdir, out = map(workdir_lib.expanded, (arguments.workdir, arguments.out))
  before = _read_added(workdir)
  step, params = adapters.load_params(workdir, tables='device')
  base = stored.params_fingerprint(workdir, step)
  # What has deltas in its tables already is still of their base.
  bases = {base, *(meta['of'] for _, meta in before)}
  for folder in map(workdir_lib.expanded, arguments.adapters):
    tensors, meta = read_rows(folder)
    if meta['base'] not in bases:
      adapter_files.require_base(folder, meta, base, arguments.force)
    name = epath.Path(folder).name
    digest = adapter_files.digest_of(folder, meta)
    for _, other in before:
      is_known = digest == other.get('delta') or name == other['name']
      require(
        not is_known,
        f'{folder!r} is in the tables already, as {other["name"]!r}: a delta '
        'is added once.',
      )
    deltas = row_deltas.from_tensors(tensors, params, folder)
    for _, other in before:
      _tell_of_overlap(name, deltas, other['name'], before)
    params, old = row_deltas.added(params, deltas)
    kept = {f'{path}/rows': rows for path, (rows, _) in deltas.items()}
    kept |= {f'{path}/old': rows for path, rows in old.items()}
    meta = dict(
      kind='rows', name=name, order=len(before), of=meta['base'], delta=digest
    )
    before.append((kept, meta))
    print(f'{sum(len(r) for r, _ in deltas.values()):,} rows of {name} added.')
  _write(workdir, out, step, params, before, dict(added=arguments.adapters))


def _tell_of_overlap(name, deltas, other, before):
  kept = next(tensors for tensors, meta in before if meta['name'] == other)
  for path, (rows, _) in deltas.items():
    common = np.intersect1d(rows, kept.get(f'{path}/rows', rows[:0]))
    if len(common):
      print(
        f'{len(common):,} rows of {path} are changed by {other} and by {name}.'
      )


def remove(argv: Sequence[str]) -> None:
  """Writes a workdir whose tables have the rows that were there before."""
  parser = Parser(
    prog='jaxsparse adapters remove',
    description='Write a new workdir with the rows as they were before a delta '
    'was added, to the bit.',
  )
  parser.add_argument('workdir', help='that `add` wrote')
  parser.add_argument('name', help='of the delta')
  parser.add_argument('--out', required=True, help='folder of the new workdir')
  arguments = parser.parse_args(argv)
  workdir, out = map(workdir_lib.expanded, (arguments.workdir, arguments.out))
  kept = _read_added(workdir)
  names = [meta['name'] for _, meta in kept]
  name = arguments.name
  require(
    name in names,
    f'name must be of a delta in the tables of {workdir!r}, which has '
    f'{", ".join(names) or "none"}; got {name!r}.',
  )
  step, params = adapters.load_params(workdir, tables='device')
  place = names.index(name)
  tensors, meta = kept.pop(place)
  now = stored.params_fingerprint(workdir, step)
  require(
    meta['base'] == now,
    f'the tables of {workdir!r} are no longer those that {name!r} was added '
    'to, as they were trained on: take the workdir that `add` wrote.',
  )
  paths = [n.removesuffix('/rows') for n in tensors if n.endswith('/rows')]
  for later, of in kept[place:]:
    overlaps = any(
      len(np.intersect1d(tensors[f'{p}/rows'], later.get(f'{p}/rows', [])))
      for p in paths
    )
    require(
      not overlaps,
      f'{of["name"]!r} was added later and changes rows of {name!r}, too: '
      f'remove {of["name"]!r} first.',
    )
  old = {p: (tensors[f'{p}/rows'], tensors[f'{p}/old']) for p in paths}
  params = row_deltas.restored(params, old)
  for order, (_, of) in enumerate(kept):
    of['order'] = order
  _write(workdir, out, step, params, kept, dict(removed=name))


def _write(workdir, out, step, params, kept, origin):
  config = run_config.read(workdir)
  new_workdir.require_new(out, '--out')
  with new_workdir.emptied_on_failure(out):
    tokenizer_roles.copy_tokenizer(workdir, out)
    origin = dict(workdir=workdir, step=step, **origin)
    new_workdir.write(out, config, params, origin)
    (step,) = stored.steps_in(out)
    base = stored.params_fingerprint(out, step)
    for tensors, meta in kept:
      folder = epath.Path(out) / _FOLDER / meta['name']
      adapter_files.write(folder, tensors, meta | dict(base=base))
  print(f'{out} holds the model.')
