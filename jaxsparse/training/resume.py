# SPDX-License-Identifier: Apache-2.0
"""What may change between two starts of one workdir."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable

from etils import epath

from jaxsparse.config import Config, saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.data import tokenizer as tokenizer_lib
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.run import (
  checkpoint,
  field_meanings,
  new_workdir,
  run_config,
  start,
  stored,
)
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.training import changes
from jaxsparse.training.trained_rows import FOLDER as RANKING


def open_workdir(
  config: Config,
  workdir: epath.PathLike,
  say: Callable[[str], None] = print,
) -> tuple[Config, list[str]]:
  """Makes the workdir, or checks that it is this config's own.

  Args:
    config: of this start.
    workdir: its folder.
    say: gets a sentence if config.json is damaged and a copy is taken.

  Returns:
    The config, with the vocabulary that the workdir's run took from its
    tokenizer, and the accepted differences to the config saved there.

  Raises:
    UserError: the workdir can't be written, or is another model's.
  """
  workdir = epath.Path(workdir_lib.expanded(workdir))
  with workdir_lib.write_errors(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / '.writable').touch()
    (workdir / '.writable').unlink(missing_ok=True)
  saved = _saved(workdir, say)
  if saved is None:
    return config, []
  if not config.model.vocab_size:
    config = dataclasses.replace(
      config,
      model=dataclasses.replace(
        config.model, vocab_size=saved.model.vocab_size
      ),
    )
  if start.is_elsewhere(saved, config, workdir):
    say(
      f'train.start_from = {config.train.start_from!r} is what this run began '
      f'with from {saved.train.start_from!r}.'
    )
    start.settle(config, workdir)
    train = dataclasses.replace(saved.train, start_from=config.train.start_from)
    saved = dataclasses.replace(saved, train=train)
  refused, accepted = changes.judge(saved, config)
  if not _has_begun(workdir):
    # Of what was brought in, the parameters alone are given.
    accepted = []
    given = ('model.', 'train.start_from')
    refused = {k: why for k, why in refused.items() if k.startswith(given)}
  if not (stored.steps_in(workdir) or (workdir / RANKING).exists()):
    # An adapter that was refused, or drawn and lost, may be another.
    begun = [name for name in refused if name.startswith('adapter.')]
    accepted += begun
    refused = {k: why for k, why in refused.items() if k not in begun}
  if refused:
    why = ' and '.join(dict.fromkeys(refused.values()))
    raise UserError(
      f'workdir {str(workdir)!r} belongs to a run with another config '
      f'({"; ".join(refused)}), and {why}: undo the change or give another '
      '--workdir.'
    )
  return config, accepted


def _has_begun(workdir: epath.Path) -> bool:
  """Whether any text was trained on; not so of what `new_workdir` wrote."""
  record = checkpoint.read_record(workdir)
  return record is None or new_workdir.ORIGIN not in record


def require_tokenizer(config: Config, workdir: epath.PathLike) -> None:
  """Refuses to make a tokenizer for parameters that were given.

  Raises:
    UserError: the workdir has such, and lacks the tokenizer of their training.
  """
  workdir = epath.Path(workdir)
  if _has_begun(workdir) or workdir_lib.has_tokenizer(workdir):
    return
  if config.data.tokenizer in ('bytes', 'bpe'):
    raise UserError(
      f'workdir {str(workdir)!r} holds a trained model but no tokenizer: put '
      f'its {" or ".join(workdir_lib.TOKENIZERS)} there, or name it by '
      '--config.data.tokenizer=FILE.'
    )


def _saved(
  workdir: epath.Path, say: Callable[[str], None] = lambda text: None
) -> Config | None:
  """The config of the workdir's last start; None for a new workdir."""
  if (workdir / workdir_lib.CONFIG).exists():
    return run_config.read(workdir, say, may_see=True)
  copy = run_config.saved_copy(workdir)
  if copy:
    say(f'{workdir_lib.CONFIG} was missing: the newest checkpoint has a copy.')
  return copy


def require_same_data(
  config: Config, corpus: Corpus, workdir: epath.PathLike
) -> None:
  """Checks that text and tokenizer are the run's, under whatever names.

  Raises:
    UserError: the run was trained on other text, by another tokenizer, or with
      another number of lanes.
  """
  workdir = epath.Path(workdir_lib.expanded(workdir))
  advice = 'undo the change or give another --workdir.'
  record = checkpoint.read_record(workdir)
  if record and 'data' in record:
    data = record['data']
    if data['corpus'] != corpus.key:
      raise UserError(
        f'workdir {str(workdir)!r} belongs to a run on another text, or with '
        f'another split of it (its hash is {data["corpus"]}, that of this '
        f'text {corpus.key}): {advice}'
      )
    if config.data.num_lanes not in (0, data['num_lanes']):
      raise UserError(
        f'data.num_lanes must be {data["num_lanes"]} as in the run of workdir '
        f'{str(workdir)!r}, or 0 to go on with them; got '
        f'{config.data.num_lanes}: each lane has its place in the text.'
      )
  saved = _saved(workdir)
  if saved is None:
    return
  changed = saved_config.differences(saved.data, config.data, 'data')
  is_named_anew = not changed.keys().isdisjoint(field_meanings.TOKENIZER)
  # With a checkpoint the text is the same, and so is what it trains.
  may_be_trained_anew = (
    record is None
    and not config.train.start_from
    and config.data.tokenizer == 'bpe'
    and not changed.keys().isdisjoint(field_meanings.TEXT)
  )
  if (is_named_anew or may_be_trained_anew) and has_other_tokenizer(
    config, corpus, workdir
  ):
    raise UserError(
      f'data.tokenizer = {config.data.tokenizer!r} is not the one that workdir '
      f'{str(workdir)!r} has: {advice}'
    )


def has_other_tokenizer(
  config: Config, corpus: Corpus | None, workdir: epath.PathLike
) -> bool:
  """Whether the tokenizer that the config names is not the workdir's."""

  def content(of: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
      of.save(folder)
      files = pathlib.Path(folder).iterdir()
      return {file.name: file.read_bytes() for file in files}

  with tempfile.TemporaryDirectory() as folder:
    named = tokenizer_lib.make_tokenizer(config.data, corpus, folder)
  try:
    own = tokenizer_lib.load_from_workdir(workdir)
  except UserError:
    # Killed before it had one.
    return False
  return content(named) != content(own)


def rate_changes(record: dict, config: Config, step: int) -> list[str]:
  """Learning rates that jump where the run goes on.

  Args:
    record: of the checkpoint; older versions put no config there.
    config: of this start.
    step: of the checkpoint.
  """
  if 'config' not in record:
    return []
  old = saved_config.from_json(record['config'])
  return changes.rates(old, config, step)


def save_config(config: Config, workdir: epath.PathLike) -> None:
  """Writes the config of the run, at once or not at all.

  Raises:
    UserError: the workdir can't be written.
  """
  workdir = epath.Path(workdir_lib.expanded(workdir))
  with workdir_lib.write_errors(workdir):
    workdir_lib.write_whole(
      workdir / workdir_lib.CONFIG, saved_config.to_json(config).encode()
    )
