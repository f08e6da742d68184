# SPDX-License-Identifier: Apache-2.0
"""What of a model a run trains, and what it only reads.

A step differentiates the trained part alone, and the optimizer has a state of
it alone. The frozen part stands beside it and is never written, so a run takes
the memory of all parameters and, with AdamW, 12 bytes more for each that it
trains: a gradient and two moments.
"""

import re
from typing import Any

import jax

from jaxsparse.config import OptimizerConfig
from jaxsparse.config.errors import require


def split(config: OptimizerConfig, params: dict) -> tuple[dict, dict]:
  """The leaves that `config.trained` finds, and the others.

  Args:
    config: of the run.
    params: nested dicts of arrays, or of what stands for one.

  Returns:
    Nested dicts; modules that have nothing of a part are not in it.
  """
  return _split(params, '', re.compile(config.trained))


def _split(params: dict, prefix: str, trained: re.Pattern) -> tuple[dict, dict]:
  parts: tuple[dict, dict] = {}, {}
  for name, value in params.items():
    path = prefix + name
    if isinstance(value, dict):
      for part, found in zip(
        parts, _split(value, f'{path}/', trained), strict=True
      ):
        if found:
          part[name] = found
    else:
      parts[not trained.search(path)][name] = value
  return parts


def joined(frozen: dict, trained: dict) -> dict:
  """The parameters that the model takes: what `split` has split."""
  params = dict(frozen)
  for name, value in trained.items():
    is_in_both = name in params
    params[name] = joined(params[name], value) if is_in_both else value
  return params


def require_any(config: OptimizerConfig, params: dict) -> None:
  """Refuses a run that would train nothing.

  Raises:
    UserError: `config.trained` finds no leaf of all parameters.
  """
  if jax.tree.leaves(split(config, params)[0]):
    return
  path, _ = jax.tree.leaves_with_path(params)[0]
  example = jax.tree_util.keystr(path, simple=True, separator='/')
  require(
    False,
    f'optimizer.trained must find a parameter, such as {example!r}, got '
    f'{config.trained!r}.',
  )


def describe(config: OptimizerConfig, trained: dict, frozen: dict) -> str:
  """How much of a model is trained, in a sentence."""
  of, rest = (
    sum(x.size for x in jax.tree.leaves(part)) for part in (trained, frozen)
  )
  return (
    f'optimizer.trained = {config.trained!r} trains {of:,} of {of + rest:,} '
    f'parameters ({of / (of + rest):.1%}).'
  )


def trains_tables(config: OptimizerConfig, tables: dict[str, Any]) -> bool:
  """Whether tables that lie elsewhere are trained: all of them, or none.

  Args:
    config: of the run.
    tables: by their paths.

  Raises:
    UserError: it is some of them.
  """
  others = [path for path in tables if not re.search(config.trained, path)]
  require(
    len(others) in (0, len(tables)),
    'optimizer.trained must find all tables or none where they lie in files, '
    f'got {config.trained!r}, which finds others than {"".join(others[:1])!r}.',
  )
  return not others
