# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison: planned, trained one by one, kept as results.

Every run has a folder of its own, which is an ordinary workdir, so a run that
was stopped goes on from its checkpoint. When it ends, its `result.json` holds
all that tables and plots need, and its checkpoints are removed, unless other
runs begin with them.
"""

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsparse import config as config_lib
from jaxsparse import mesh
from jaxsparse.config import Config, renamed
from jaxsparse.config.errors import UserError
from jaxsparse.data import facts, needles, tokenizer
from jaxsparse.data.corpus import build_corpus
from jaxsparse.experiments.compare import answers, results
from jaxsparse.experiments.compare.planned import Run
from jaxsparse.experiments.compare.planned import plan as plan
from jaxsparse.experiments.compare.results import Result
from jaxsparse.run import compiled_programs, workdir_lock
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.progress import Reporter
from jaxsparse.training import (
  inputs,
  loop,
  ranked_texts,
  resume,
  start_from,
)
from jaxsparse.training.any_rate import AnyRateStep

RESULT = 'result.json'

# Parts of a model that the default one does not have.
_PARTS = dict(
  memory=config_lib.MemoryConfig,
  moe=config_lib.MoEConfig,
  dcmha=config_lib.DCMHAConfig,
  sparse=config_lib.SparseAttentionConfig,
  rope_scaling=config_lib.RopeScalingConfig,
)


def finished(run: Run) -> Result | None:
  """What the run gave, if it has ended.

  Raises:
    UserError: the folder holds the result of another config.
  """
  path = run.folder / RESULT
  if not path.exists():
    return None
  try:
    result = json.loads(path.read_bytes())
    saved = copy.deepcopy(result['config'])
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise UserError(
      f'{str(path)!r} is damaged: remove it, and the run is trained again.'
    ) from error
  renamed.renew(saved)
  defaults = _as_json(dataclasses.asdict(Config()))
  if not _is_same(saved, _as_json(_identity(run)), defaults):
    raise UserError(
      f'{str(path)!r} is the result of another config: undo the change of the '
      'suite, or give another --workdir.'
    )
  return result


def _identity(run: Run) -> dict:
  config = dataclasses.asdict(run.config)
  # They change nothing in a result.
  del config['mesh'], config['data']['cache_dir'], config['data']['prefetch']
  if config['data']['split'] == 'auto':
    # As results of former versions have it. A text that is too small for it has
    # other batches since, which are found to be others.
    config['data']['split'] = 'file'
  for name in (
    'log_every',
    'save_every',
    'keep_checkpoints',
    'keep_best',
    'stop_signals',
    'wandb_project',
  ):
    del config['train'][name]
  config |= dict(num_phrasings=run.num_phrasings)
  if run.needles:
    config |= dict(needles=dataclasses.asdict(run.needles))
  if run.known:
    # The workdir may be elsewhere.
    config['train']['start_from'] = ''
    config |= _beside(run)
  return config


def _beside(run: Run) -> dict[str, Any]:
  """What a run's people and text are beside; nothing of one that begins."""
  if run.known is None:
    return {}
  return dict(old_people=run.known.people, replay_share=run.known.replay_share)


def _is_same(old: Any, new: Any, default: Any) -> bool:
  """Whether two configs are equal; `old` may lack fields added since.

  Those must have their defaults, under which all is as it was before.
  """
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return old == new
  for name, value in new.items():
    if name not in old:
      if name not in default or value != default[name]:
        return False
      continue
    of_part = default.get(name)
    if of_part is None and name in _PARTS:
      of_part = _as_json(dataclasses.asdict(_PARTS[name]()))
    if not _is_same(old[name], value, of_part or {}):
      return False
  return old.keys() <= new.keys()


def _as_json(value: Any) -> Any:
  """The value as reading it from JSON gives it: with lists for tuples."""
  return json.loads(json.dumps(value))


def train_all(
  runs: Sequence[Run],
  reporter: Reporter,
  on_result: Callable[[list[Result]], None] = lambda done: None,
  keeps_models: bool = False,
) -> tuple[list[Result], bool]:
  """Trains what is not finished yet.

  Args:
    runs: of `plan`.
    reporter: shows what happens.
    on_result: is given all results so far after each run that was trained.
    keeps_models: leave the checkpoints of what is trained.

  Returns:
    The results of all runs that are finished, and whether a signal stopped the
    rest.

  Raises:
    UserError: a run can't go on, or its batches are not those of the others.
  """
  done = {run: found for run in runs if (found := finished(run))}
  if done:
    reporter.say(f'{len(done)} of {len(runs)} runs are finished already.')
  seconds = []
  for index, run in enumerate(runs):
    if run in done:
      continue
    waiting = len(runs) - len(done)
    left = _time_left(seconds, list(done.values()), waiting)
    reporter.say(f'Run {index + 1} of {len(runs)}: {run.title}{left}')
    start = time.perf_counter()
    result = train(run, reporter, list(done.values()), keeps_models)
    if result is None:
      return list(done.values()), True
    seconds.append(time.perf_counter() - start)
    done[run] = result
    on_result(list(done.values()))
    if run.known is None:
      # Each run compiles programs of its own.
      jax.clear_caches()
  return [done[run] for run in runs], False


def _time_left(seconds: list[float], done: list[Result], waiting: int) -> str:
  known = seconds or [result['seconds'] for result in done]
  if not known:
    return ''
  minutes = float(np.mean(known)) * waiting / 60
  return f' (about {minutes / 60:.1f} hours left)' if minutes > 90 else (
    f' (about {minutes:.0f} minutes left)'
  )  # fmt: skip


def train(
  run: Run,
  reporter: Reporter,
  others: Iterable[Result] = (),
  keeps_model: bool = False,
) -> Result | None:
  """Trains, or goes on training, and writes the result.

  Args:
    run: is not finished yet.
    reporter: shows what happens.
    others: results; those of the same text and seed had the same batches.
    keeps_model: leave the checkpoints.

  Returns:
    The result; None if a signal stopped the run.

  Raises:
    UserError: the run can't go on, or its batches are not those of the others.
  """
  with workdir_lock.held(run.folder, reporter.say):
    return _train(run, reporter, others, keeps_model)


def _train(
  run: Run, reporter: Reporter, others: Iterable[Result], keeps_model: bool
) -> Result | None:
  start = time.perf_counter()
  config = run.config
  text = dataclasses.replace(config.data, **_write_text(run))
  config = dataclasses.replace(config, data=text)
  config, _ = resume.open_workdir(config, run.folder, reporter.say)
  config = start_from.begin(config, run.folder, reporter.say)
  compiled_programs.keep(config.data.cache_dir, reporter.say)
  corpus = build_corpus(config.data, reporter.say)
  resume.require_same_data(config, corpus, run.folder)
  tokens = tokenizer.make_tokenizer(config.data, corpus, run.folder)
  corpus, _ = inputs.with_answers(
    config.data, corpus, tokens, run.folder, reporter.say
  )
  config = inputs.with_vocabulary(config, tokens.vocab_size)
  resume.save_config(config, run.folder)
  batches = results.first_batches(config, corpus, tokens)
  _check_same_batches(run, batches, others)
  with jax.set_mesh(mesh.make_mesh(**dataclasses.asdict(config.mesh))):
    data = dataclasses.replace(
      inputs.training_data(config, corpus, tokens),
      ranked_by=ranked_texts.of_run(config, corpus, tokens),
    )
    outcome = loop.fit(
      config,
      run.folder,
      data,
      reporter,
      lambda speed: None,
      **(dict(make_step=AnyRateStep) if run.known else {}),
    )
    if outcome.validation is None:
      return None
    found = answers.ask(run, config, outcome.params, tokens, reporter)
  result = dict(
    architecture=run.architecture,
    seed=run.seed,
    people=run.people,
    batches=batches,
    seconds=time.perf_counter() - start,
    **results.describe(config, run.folder, outcome.validation),
    config=_as_json(_identity(run)),
    **_beside(run),
    **found,
  )
  _write(run, result)
  if not (keeps_model or run.keeps_checkpoints):
    # What is left if a kill comes before this is only disk space.
    shutil.rmtree(run.folder / workdir_lib.CHECKPOINTS, ignore_errors=True)
  return result


def _write_text(run: Run) -> dict[str, Any]:
  """Generates the text; the fields of the `DataConfig` that name it."""
  if run.people:
    fields = facts.write(
      run.data_folder, answers.people_of(run), run.seed, run.num_phrasings
    )
    if run.known:
      # Rows are ranked against it, mixed in or not.
      fields |= dict(
        replay=str(run.known.data_folder / '*.txt'),
        replay_share=run.known.replay_share,
      )
    return fields
  if run.needles:
    return needles.write(run.data_folder, run.needles, run.seed)
  return {}


def _check_same_batches(
  run: Run, batches: str, others: Iterable[Result]
) -> None:
  text = dict(seed=run.seed, people=run.people) | _beside(run)
  for other in others:
    if _text_of(other) == text and other['batches'] != batches:
      raise UserError(
        f'{run.title} would train on other batches than '
        f'{other["architecture"]} did: the text has changed since, so give '
        'another --workdir.'
      )


def _text_of(result: Result) -> dict[str, Any]:
  names = ('seed', 'people', 'old_people', 'replay_share')
  return {name: result[name] for name in names if name in result}


def _write(run: Run, result: Result) -> None:
  content = json.dumps(result, indent=1) + '\n'
  with workdir_lib.write_errors(run.folder):
    workdir_lib.write_whole(run.folder / RESULT, content.encode())
