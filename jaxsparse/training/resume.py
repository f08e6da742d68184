"""What may change between two starts of one workdir."""

from etils import epath

from jaxsparse import config as config_lib
from jaxsparse import workdir as workdir_lib
from jaxsparse.config import Config
from jaxsparse.errors import UserError

# The state or the order of the data would no longer fit.
_FIXED = ('model.', 'data.', 'train.seed')
_FREE = ('data.prefetch', 'data.cache_dir')


def claim_workdir(config: Config, workdir: epath.PathLike) -> list[str]:
  """Makes the workdir this config's own, or checks that it is.

  Returns:
    The accepted differences to the config that was there.

  Raises:
    UserError: the workdir can't be made, or is another model's.
  """
  workdir = epath.Path(workdir)
  path = workdir / workdir_lib.CONFIG
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    changes = []
    if path.exists():
      saved = workdir_lib.read_config(workdir)
      changes = config_lib.differences(saved, config)
    refused = [
      c for c in changes if c.startswith(_FIXED) and not c.startswith(_FREE)
    ]
    if refused:
      raise UserError(
        f'workdir {str(workdir)!r} belongs to a run with another config '
        f'({"; ".join(refused)}): undo the change or give another --workdir.'
      )
    new = path.with_suffix('.new')
    new.write_text(config_lib.to_json(config))
    new.replace(path)
  except OSError as error:
    raise UserError(
      f"workdir {str(workdir)!r} can't be written ({error.strerror}): give "
      'another --workdir.'
    ) from error
  return changes
