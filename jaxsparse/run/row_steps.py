# SPDX-License-Identifier: Apache-2.0
"""What a row store says of a step: its leaves, and their fingerprints."""

import base64
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsparse.config.errors import UserError, require
from jaxsparse.run import fingerprints, row_file

STEPS = 'steps'

_FORMAT = 1

# Of the rows that have a fingerprint in common.
_STRIPE_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What the rows of a file are.

  Attributes:
    num_rows: M.
    width: values of a row; 0 for one without a dimension of its own.
    dtype: of a value: 'float32', 'bfloat16', 'int32' or 'uint8'.
    row_format: what JSON says of rows that are packed bytes: their kind, and
      what reads them back.
  """

  num_rows: int
  width: int
  dtype: str
  row_format: dict = dataclasses.field(default_factory=dict)

  @property
  def shape(self) -> tuple[int, ...]:
    return (self.num_rows, self.width) if self.width else (self.num_rows,)

  @property
  def row_bytes(self) -> int:
    return max(1, self.width) * row_file.dtype_of(self.dtype).itemsize

  @property
  def stripe_rows(self) -> int:
    return max(1, _STRIPE_BYTES // self.row_bytes)

  @property
  def num_stripes(self) -> int:
    return -(-self.num_rows // self.stripe_rows)


def described(
  step: int,
  leaves: Mapping[str, Leaf],
  sums: Mapping[str, np.ndarray],
  origin: Any,
) -> dict[str, Any]:
  """What the file of a step holds, sealed.

  Args:
    step: that is sealed.
    leaves: by their names.
    sums: of each leaf the fingerprints of its stripes.
    origin: what the rows are from, of what JSON can hold.
  """
  of_leaves = {}
  for name, leaf in leaves.items():
    coded = base64.b64encode(sums[name].astype('<u4').tobytes()).decode()
    of_leaves[name] = dataclasses.asdict(leaf) | dict(
      stripe_rows=leaf.stripe_rows, fingerprints=coded
    )
  return fingerprints.seal(
    dict(format=_FORMAT, step=step, origin=origin, leaves=of_leaves)
  )


def leaves_of(
  folder: pathlib.Path, step: int, content: dict[str, Any]
) -> tuple[dict[str, Leaf], dict[str, np.ndarray]]:
  """What a step says of the leaves, and their fingerprints."""
  leaves, sums = {}, {}
  try:
    for name, of in content['leaves'].items():
      coded, _ = of.pop('fingerprints'), of.pop('stripe_rows')
      leaves[name] = Leaf(**of)
      sums[name] = np.frombuffer(base64.b64decode(coded), '<u4').copy()
      is_known = leaves[name].num_stripes == len(sums[name])
      require(is_known, _unknown(folder, step))
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise UserError(_unknown(folder, step)) from error
  return leaves, sums


def _unknown(folder: pathlib.Path, step: int) -> str:
  path = str(step_path(folder, step))
  return f'{path!r} is damaged, or of another version of jaxsparse.'


def sealed_steps(folder: pathlib.Path) -> list[int]:
  """Steps at which the store can be opened, oldest first."""
  names = (p.stem for p in (folder / STEPS).glob('*.json'))
  return sorted(int(name) for name in names if name.isdecimal())


def read_step(folder: pathlib.Path, step: int) -> dict[str, Any]:
  path = step_path(folder, step)
  try:
    sealed = json.loads(path.read_bytes())
    content = fingerprints.unseal(sealed)
    is_known = content['format'] == _FORMAT and content['step'] == step
  except FileNotFoundError:
    steps = sealed_steps(folder)
    raise UserError(
      f'{str(folder)!r} has no tables of step {step}: it has those of '
      f'{steps or "none"}.'
    ) from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{str(path)!r} is damaged, so the tables can't be opened: copy the "
      'workdir from where it is whole.'
    ) from error
  require(is_known, _unknown(folder, step))
  return content | dict(digest=sealed['digest'])


def rows_path(folder: pathlib.Path, name: str) -> pathlib.Path:
  path = pathlib.PurePosixPath(name)
  require(
    not path.is_absolute() and '..' not in path.parts,
    f'the name of a table must lead into its store, got {name!r}.',
  )
  return folder / path.with_name(f'{path.name}.rows')


def step_name(step: int) -> str:
  return f'{step:010d}'


def step_path(folder: pathlib.Path, step: int) -> pathlib.Path:
  return folder / STEPS / f'{step_name(step)}.json'
