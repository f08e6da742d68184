"""What may change between two starts of one workdir."""

import contextlib
import dataclasses
from collections.abc import Iterator

from etils import epath

from jaxsparse import saved_config
from jaxsparse import workdir as workdir_lib
from jaxsparse.config import Config
from jaxsparse.errors import UserError

# The state or the order of the data would no longer fit.
_FIXED = ('model.', 'data.', 'train.seed', 'optimizer.value_')
_FREE = (
  'data.prefetch',
  'data.cache_dir',
  'model.memory.scheme',
  'model.memory.table_gradient',
  'model.sparse.mode',
  'optimizer.value_lr_',
  'optimizer.value_row_budget',
)


def claim_workdir(
  config: Config, workdir: epath.PathLike
) -> tuple[Config, list[str]]:
  """Makes the workdir, or checks that it is this config's own.

  Returns:
    The config, with the vocabulary that the workdir's run took from its
    tokenizer, and the accepted differences to the config saved there.

  Raises:
    UserError: the workdir can't be written, or is another model's.
  """
  workdir = epath.Path(workdir)
  with _sentences(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / '.writable').touch()
    (workdir / '.writable').unlink(missing_ok=True)
    if not (workdir / workdir_lib.CONFIG).exists():
      return config, []
  saved = workdir_lib.read_config(workdir)
  if not config.model.vocab_size:
    config = dataclasses.replace(
      config,
      model=dataclasses.replace(
        config.model, vocab_size=saved.model.vocab_size
      ),
    )
  changes = saved_config.differences(saved, config)
  refused = [
    c for c in changes if c.startswith(_FIXED) and not c.startswith(_FREE)
  ]
  if refused:
    raise UserError(
      f'workdir {str(workdir)!r} belongs to a run with another config '
      f'({"; ".join(refused)}): undo the change or give another --workdir.'
    )
  return config, changes


def save_config(config: Config, workdir: epath.PathLike) -> None:
  """Writes the config of the run, at once or not at all.

  Raises:
    UserError: the workdir can't be written.
  """
  path = epath.Path(workdir) / workdir_lib.CONFIG
  with _sentences(path.parent):
    new = path.with_suffix('.new')
    new.write_text(saved_config.to_json(config))
    new.replace(path)


@contextlib.contextmanager
def _sentences(workdir: epath.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f"workdir {str(workdir)!r} can't be written ({error.strerror}): give "
      'another --workdir or make room.'
    ) from error
