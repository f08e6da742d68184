# SPDX-License-Identifier: Apache-2.0
"""What weights belong to: the tokenizer and the model they were trained with.

A checkpoint records both. Other ones in the workdir, even of equal sizes, would
give text and losses without meaning, and no word of it.
"""

import hashlib

from etils import epath

from jaxsparse.config import Config, saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.field_meanings import meaning_of

CONFIG, TOKENIZER = 'config', 'tokenizer'


def record(config: Config, workdir: epath.PathLike) -> dict:
  """What a checkpoint says of the run; anything in it JSON can hold."""
  return {
    CONFIG: saved_config.to_json(config),
    TOKENIZER: _tokenizer(workdir),
  }


def check(recorded: dict, workdir: epath.PathLike) -> None:
  """Compares the workdir's files with a record; older ones have less in it.

  Raises:
    UserError: the tokenizer or the model is another one.
  """
  found = _tokenizer(workdir)
  if found != recorded.get(TOKENIZER, found):
    raise UserError(
      f'{next(iter(found or recorded[TOKENIZER]))} in workdir '
      f'{str(workdir)!r} is not the tokenizer that its checkpoint was trained '
      'with: put that one back, or give another --workdir.'
    )
  try:
    new = saved_config.from_json(
      (epath.Path(workdir) / workdir_lib.CONFIG).read_text()
    )
  except (OSError, ValueError, UserError):
    return  # Whoever reads the config says so.
  if CONFIG not in recorded:
    return
  old = saved_config.from_json(recorded[CONFIG])
  # Those after which equal weights are another model.
  changes = [
    f'{name}: {before!r} -> {after!r}'
    for name, (before, after) in saved_config.differences(
      old.model, new.model, 'model'
    ).items()
    if not meaning_of(name, before, after, old).is_allowed
  ]
  if changes:
    raise UserError(
      f'{workdir_lib.CONFIG} in workdir {str(workdir)!r} is of another model '
      f'than its checkpoint ({"; ".join(changes)}): undo the change, or give '
      'another --workdir.'
    )


def _tokenizer(workdir: epath.PathLike) -> dict[str, str]:
  """Name and SHA-256 of the tokenizer in use; empty where there is none."""
  for name in workdir_lib.TOKENIZERS:
    path = epath.Path(workdir) / name
    if path.is_file():
      return {name: hashlib.sha256(path.read_bytes()).hexdigest()}
  return {}
