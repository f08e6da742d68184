# SPDX-License-Identifier: Apache-2.0
"""Configs that are YAML."""

import pathlib
import re
from typing import Any

import yaml

from jaxsparse.config.errors import UserError, require


class _Loader(yaml.SafeLoader):
  """Takes 1e-5 for a number, too, as YAML 1.2 and JSON do."""


_Loader.add_implicit_resolver(
  'tag:yaml.org,2002:float',
  re.compile(r'[-+]?\d+[eE][-+]?\d+$'),
  list('-+0123456789'),
)


def read(path: pathlib.Path) -> dict[str, Any]:
  """What a file holds.

  Raises:
    UserError: it can't be read, or is no mapping.
  """
  try:
    content = yaml.load(path.read_text('utf-8'), _Loader)
  except (OSError, ValueError, yaml.YAMLError) as error:
    raise UserError(
      f"{str(path)!r} can't be read as YAML: it is cut off or damaged, so "
      'fetch it again.'
    ) from error
  require(
    isinstance(content, dict),
    f'{str(path)!r} must hold fields and values, but holds none.',
  )
  return content
