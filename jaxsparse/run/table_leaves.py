# SPDX-License-Identifier: Apache-2.0
"""The tables among the parameters, which may lie elsewhere than these."""

from typing import Any

# Names of the leaves that are tables.
NAMES = ('value_table', 'pre_value_table')

# Of a checkpoint without them: what in its record is the digest of those that
# lie in files.
ON_FILE = 'tables'


def split(params: dict) -> tuple[dict, dict[str, Any]]:
  """The parameters without the tables, and these by their paths.

  A path is such as 'block_01/memory/value_table'. Modules that hold nothing
  else are left out.
  """
  rest, tables = {}, {}
  for name, value in params.items():
    if name in NAMES and isinstance(value, dict):
      # A quantized one, as it is saved.
      tables |= {f'{name}/{part}': of for part, of in value.items()}
    elif isinstance(value, dict):
      inner, found = split(value)
      tables |= {f'{name}/{path}': leaf for path, leaf in found.items()}
      if inner or not found:
        rest[name] = inner
    elif name in NAMES:
      tables[name] = value
    else:
      rest[name] = value
  return rest, tables


def joined(rest: dict, tables: dict[str, Any]) -> dict:
  """What `split` has split."""
  params = dict(rest)
  for path, leaf in tables.items():
    name, _, below = path.partition('/')
    if below:
      params[name] = joined(params.get(name, {}), {below: leaf})
    else:
      params[name] = leaf
  return params
