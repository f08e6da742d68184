# SPDX-License-Identifier: Apache-2.0
"""Documents given to train, validation and test."""

import numpy as np
import pytest

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import documents, splits


def _documents(*sizes: int) -> list[documents.Document]:
  return [
    documents.Document(name=f'{i:03}.txt', content=b'x' * size)
    for i, size in enumerate(sizes)
  ]


def _split(documents_: list, **fields) -> splits.Splits:
  sizes = [document.measure() for document in documents_]
  return splits.split(documents_, sizes, DataConfig(**fields))


def _num_bytes(spans: list) -> int:
  return sum(span.stop - span.start for span in spans)


def test_split_by_file_is_disjoint_whole_and_near_the_fraction():
  sizes = np.random.default_rng(0).integers(1, 2000, 300).tolist()
  found = _split(_documents(*sizes), validation_fraction=0.1, test_fraction=0.2)
  names = [span.document.name for s in found.values() for span in s]
  assert sorted(names) == [f'{i:03}.txt' for i in range(300)]
  assert _num_bytes(found['validation']) == pytest.approx(
    0.1 * sum(sizes), rel=0.1
  )
  assert _num_bytes(found['test']) == pytest.approx(0.2 * sum(sizes), rel=0.1)
  assert found == _split(
    _documents(*sizes), validation_fraction=0.1, test_fraction=0.2
  )


def test_a_huge_file_stays_in_training():
  found = _split(_documents(10**6, *[1000] * 50))
  assert '000.txt' in [span.document.name for span in found['train']]
  assert found['validation']


def test_a_new_file_moves_few_others():
  before = _split(_documents(*[100] * 200), validation_fraction=0.2)
  after = _split(_documents(*[100] * 201), validation_fraction=0.2)
  names = [{s.document.name for s in x['validation']} for x in (before, after)]
  assert len(names[0] ^ names[1]) <= 3


def test_split_by_bytes_is_contiguous_and_exact_like_enwik8():
  found = _split(
    _documents(61_000, 39_000), split='bytes', validation_fraction=0.05,
    test_fraction=0.05,
  )  # fmt: skip
  spans = {
    name: [(s.document.name, s.start, s.stop) for s in spans]
    for name, spans in found.items()
  }
  assert spans == dict(
    train=[('000.txt', 0, 61_000), ('001.txt', 0, 29_000)],
    validation=[('001.txt', 29_000, 34_000)],
    test=[('001.txt', 34_000, 39_000)],
  )


def test_split_by_bytes_never_cuts_a_character():
  document = documents.Document(name='a', content='🙂'.encode() * 101)
  found = _split([document], split='bytes', validation_fraction=0.3)
  assert sum(_num_bytes(spans) for spans in found.values()) == 404
  assert all(s.start % 4 == s.stop % 4 == 0 for x in found.values() for s in x)


def _kind(*sizes: int, **fields) -> str:
  files = _documents(*[0] * len(sizes))
  return splits.kind(files, sizes, DataConfig(**fields))


@pytest.mark.parametrize(
  ('sizes', 'fields', 'wanted'),
  [
    ([1000] * 20, {}, 'file'),
    # A seventh is near enough a twentieth, a half is not.
    ([1000] * 7, {}, 'file'),
    ([1000] * 2, {}, 'bytes'),
    ([1000] * 2, dict(validation_fraction=0.5), 'file'),
    ([10**9], {}, 'bytes'),
    # A file that could validate, and is far too small or too large to.
    ([10**9, 1000], {}, 'bytes'),
    ([10**9, *[1000] * 50], {}, 'bytes'),
    ([10**9, 0, 0], {}, 'bytes'),
    ([1000] * 20, dict(test_fraction=0.001), 'bytes'),
    # Nothing would be left to train on.
    (
      [1000] * 2, dict(validation_fraction=0.5, test_fraction=0.45), 'bytes'
    ),
    ([1000] * 20, dict(split='bytes'), 'bytes'),
    ([10**9], dict(split='file'), 'file'),
  ],
)  # fmt: skip
def test_auto_splits_by_file_where_that_gives_the_shares(sizes, fields, wanted):
  assert _kind(*sizes, **fields) == wanted


@pytest.mark.parametrize(
  ('sizes', 'fields', 'words'),
  [
    ((0, 0), {}, 'empty files'),
    ((), {}, 'empty files'),
    ((1000,), dict(split='file'), "no file for validation .*split='bytes'"),
    (
      (1000, 1000),
      dict(split='file', test_fraction=0.1),
      r'no file for test \(files with text: 2\)',
    ),
    ((4,), {}, 'too small for a validation split: give more text'),
    ((4,), dict(split='bytes'), 'too small for a validation split'),
  ],
)
def test_too_little_text_is_refused(sizes, fields, words):
  with pytest.raises(UserError, match=words):
    _split(_documents(*sizes), **fields)
