# SPDX-License-Identifier: Apache-2.0
"""Volumes as published in the reference's table, floors, and the choice."""

import dataclasses

import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.ops.memory.table_scheme import (
  SCHEMES,
  TableUse,
  bytes_per_token,
  choose_scheme,
  describe_scheme,
)

# Of UltraMem-1.6B's size: 84 rows of 1024 a token, 4 pools, 2 cores, bf16.
USE = TableUse(
  num_rows=3_211_264,
  width=1024,
  num_reads=84,
  num_cores=2,
  num_pools=4,
  table_bytes=2,
  wire_bytes=2,
)


def axes(data=1, sparse=1, model=1):
  return dict(data=data, sparse=sparse, model=model)


@pytest.mark.parametrize(
  ('over', 'rows', 'columns'),
  [(2, 8.9, 4.8), (8, 62, 11.9), (16, 133, 17.8), (64, 558, 50)],
)
def test_kilobytes_per_token(over, rows, columns):
  """The design's table of volumes, to its last digit."""
  found = [
    bytes_per_token(scheme, USE, axes(sparse=over)) / 1e3
    for scheme in ('rows', 'columns')
  ]
  np.testing.assert_allclose(found, [rows, columns], rtol=0.012)


def test_a_grid_is_rows_over_data_and_columns_over_sparse():
  grid = bytes_per_token('grid', USE, axes(data=2, sparse=8))
  index, pools = 84 * 8, 4 * 1024 * 2
  assert grid == 15 * index + pools + 7 / 8 * pools
  one = [bytes_per_token(s, USE, axes(data=4)) for s in ('columns', 'rows')]
  assert one == [0, 0]


def test_model_shares_the_pools():
  alone, shared = (
    bytes_per_token('columns', dataclasses.replace(USE, num_reads=0), a)
    for a in (axes(sparse=4), axes(sparse=4, model=2))
  )
  assert shared == alone / 2


@pytest.mark.parametrize(
  ('platform', 'sparse', 'chosen'),
  [
    ('gpu', 16, 'columns'),
    ('gpu', 32, 'rows'),
    ('tpu', 8, 'columns'),
    ('tpu', 16, 'rows'),
    ('cpu', 64, 'columns'),
  ],
)
def test_auto_takes_columns_down_to_the_floor(platform, sparse, chosen):
  """128 bytes are 64 columns in bf16; a TPU's lanes are 128 columns."""
  found = choose_scheme('auto', USE, axes(sparse=sparse), platform)
  assert found == chosen


@pytest.mark.parametrize(
  ('scheme', 'use', 'where', 'words'),
  [
    ('columns', {}, axes(sparse=32), ['value_dim = 1024', '32', '64 columns']),
    ('grid', {}, axes(model=32), ['value_dim = 1024', 'mesh.model', 'lower']),
    ('rows', dict(num_rows=1000), axes(sparse=16), ['1000 rows', '= 16']),
    ('auto', dict(width=96), axes(model=2), ['value_dim = 96', '64 columns']),
  ],
)
def test_too_thin_or_uneven_slices_are_refused(scheme, use, where, words):
  with pytest.raises(UserError) as error:
    choose_scheme(scheme, dataclasses.replace(USE, **use), where, 'gpu')
  for word in [f'memory.table.scheme={scheme}', *words]:
    assert word in str(error.value)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_the_choice_is_told_in_a_line(scheme):
  line = describe_scheme(scheme, USE, axes(data=2, sparse=8))
  assert scheme in line
  assert f'{bytes_per_token(scheme, USE, axes(2, 8)) / 1e3:.1f} KB' in line
