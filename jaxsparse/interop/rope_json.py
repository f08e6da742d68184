# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings as config.json has them, of transformers 4 and 5."""

import dataclasses
from typing import Any

from jaxsparse import config as config_lib
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require, shown
from jaxsparse.interop.config_json import Fields

# Of a scaling, ours and theirs.
_SCALING = dict(
  factor='factor',
  low_frequency_factor='low_freq_factor',
  high_frequency_factor='high_freq_factor',
  original_length='original_max_position_embeddings',
)
_USED = dict(linear=('factor',), llama3=tuple(_SCALING))


def read(
  fields: Fields, default: float | None = None, has_share: bool = False
) -> dict[str, Any]:
  """The rotary fields of `ModelConfig`.

  Both ways of writing are read, transformers 4's with fields of their own and
  transformers 5's `rope_parameters`; where a file has both they must agree.

  Args:
    fields: of the config.json.
    default: base where the file names none; None if it must.
    has_share: whether the family can rotate a part of each head.

  Raises:
    UserError: the base is missing, or is said twice in two ways, or the kind of
      scaling is one that we do not have.
  """
  said = {'rope_theta': [], 'partial_rotary_factor': []}
  for name in ('rope_theta', 'rotary_emb_base'):
    said['rope_theta'].append(fields.take(name, float, None))
  for name in ('partial_rotary_factor', 'rotary_pct'):
    said['partial_rotary_factor'].append(fields.take(name, float, None))
  scalings = []
  for name in ('rope_scaling', 'rope_parameters'):
    inner = Fields(fields.take(name, dict, {}), name)
    for known, values in said.items():
      values.append(inner.take(known, float, None))
    if scaling := _scaling(inner):
      scalings.append(scaling)
    inner.finish()
  base = _one('rope_theta', said['rope_theta'], default)
  share = _one(
    'partial_rotary_factor',
    said['partial_rotary_factor'],
    None if has_share else 1.0,
  )
  require(
    has_share or share == 1,
    f'partial_rotary_factor = {share} in config.json is not of this family: it '
    'must be 1.',
  )
  found = dict(rope_max_wavelength=base, rope_fraction=share)
  if scalings:
    scaling = _one('rope_scaling', scalings, None)
    found['rope_scaling'] = config_lib.RopeScalingConfig(**scaling)
  return found


def _scaling(fields: Fields) -> dict[str, Any] | None:
  kinds = [fields.take(name, str, None) for name in ('rope_type', 'type')]
  kind = _one('rope_type', kinds, 'default')
  require(
    kind in ('default', *_USED),
    f'rope_type = {shown(kind)} in config.json is a scaling that jaxsparse '
    f'does not have: it reads default, {" and ".join(_USED)} only.',
  )
  if kind == 'default':
    return None
  types = dict(original_length=int)
  return dict(kind=kind) | {
    ours: fields.take(_SCALING[ours], types.get(ours, float))
    for ours in _USED[kind]
  }


def _one(name: str, values: list, default: Any) -> Any:
  """The value that all agree on who name one."""
  given = [value for value in values if value is not None]
  require(
    all(value == given[0] for value in given),
    f'{name} is said more than once in config.json, and differently: '
    f'{", ".join(map(shown, given))}.',
  )
  require(
    bool(given) or default is not None,
    f'config.json lacks {name}, without which the model is not known.',
  )
  return given[0] if given else default


def write(config: ModelConfig, has_share: bool = False) -> dict[str, Any]:
  """The fields from which `read` makes those of `config`, in both ways."""
  base, scaling = config.rope_max_wavelength, config.rope_scaling
  inner = dict(rope_type='default', rope_theta=base)
  if scaling:
    values = dataclasses.asdict(scaling)
    inner['rope_type'] = scaling.kind
    inner |= {_SCALING[name]: values[name] for name in _USED[scaling.kind]}
  found = dict(rope_parameters=inner, rope_theta=base)
  if scaling:
    found['rope_scaling'] = dict(inner)
    del found['rope_scaling']['rope_theta']
  if has_share:
    inner['partial_rotary_factor'] = found['rotary_pct'] = config.rope_fraction
    found['rotary_emb_base'] = found.pop('rope_theta')
  return found
