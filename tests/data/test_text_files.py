# SPDX-License-Identifier: Apache-2.0
"""Paths, folders and globs, here and on a remote store."""

import os
import pathlib

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxsparse.config.errors import UserError
from jaxsparse.data import documents


def _write(folder: pathlib.Path, *names: str) -> None:
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)


def _names(pattern: str) -> list[str]:
  return [document.name for document in documents.match(pattern)]


def test_globs_name_files_below_their_common_directory(tmp_path):
  _write(tmp_path, 'a.txt', 'b/c.txt', 'd.md')
  pattern = f'{tmp_path}/**/*.txt, {tmp_path}/d.*,{tmp_path}/a.txt'
  assert _names(pattern) == ['a.txt', 'b/c.txt', 'd.md']


def test_a_folder_means_its_files_but_hidden_ones(tmp_path):
  _write(tmp_path, 'a.txt', 'b/c', 'b/.d', '.git/e', 'b/f.jsonl')
  os.mkfifo(tmp_path / 'pipe')
  wanted = ['a.txt', 'b/c', 'b/f.jsonl']
  assert _names(str(tmp_path)) == _names(f'{tmp_path}/') == wanted
  # A glob names the files beside folders, and else those in folders.
  assert _names(f'{tmp_path}/*') == ['a.txt']
  assert _names(f'{tmp_path}/b*') == ['c', 'f.jsonl']


@pytest.mark.parametrize(
  ('pattern', 'wanted'),
  [
    ('a,b.txt', ['a,b.txt']),
    ('c.txt,{}/a,b.txt,{}/d[1].txt', ['a,b.txt', 'c.txt', 'd[1].txt']),
    ('d[1].txt', ['d[1].txt']),
    ('d[12].txt', ['d1.txt']),
    ('e [x]/*.txt', ['f.txt']),
    ('e [x]', ['f.txt']),
    ('g?,h*', ['i']),
  ],
)
def test_what_exists_is_meant_as_it_is(tmp_path, pattern, wanted):
  _write(
    tmp_path, 'a,b.txt', 'c.txt', 'd[1].txt', 'd1.txt', 'e [x]/f.txt', 'g?,h*/i'
  )
  assert _names(f'{tmp_path}/' + pattern.format(tmp_path, tmp_path)) == wanted


@pytest.mark.parametrize(
  'pattern',
  [
    '{}/*.txt', '{}/folder', '{}/a,{}/*.md', ' , ', '', '{}/' + 'x' * 999,
    '{}/\0', '~no-such-user/a', '{}/pipe', 'no\udcff',
  ],
)  # fmt: skip
def test_a_pattern_without_files_is_refused(tmp_path, pattern):
  _write(tmp_path, 'a')
  (tmp_path / 'folder').mkdir()
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(UserError, match='names no file') as error:
    documents.match(pattern.format(tmp_path, tmp_path))
  str(error.value).encode()


class _Bucket(MemoryFileSystem):
  """A store of its own, as `gs://` is where gcsfs is installed."""

  protocol = 'az'
  store = {}  # noqa: RUF012
  pseudo_dirs = ['']  # noqa: RUF012

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix('az://'))

  def isdir(self, path):
    if 'closed' in path:
      raise RuntimeError('Forbidden: 403')
    return super().isdir(path)


@pytest.fixture(scope='module')
def bucket():
  fsspec.register_implementation('az', _Bucket, clobber=True)
  store = _Bucket()
  for name in ('a.txt', 'c/b.jsonl', 'c/.hidden', 'd,[1].txt'):
    store.makedirs(f'az://books/{name}'.rpartition('/')[0], exist_ok=True)
    text = f'{{"text": "{name}"}}' if 'json' in name else name
    store.pipe(f'az://books/{name}', text.encode())


@pytest.mark.usefixtures('bucket')
@pytest.mark.parametrize(
  ('pattern', 'wanted'),
  [
    ('az://books/a.txt', ['a.txt']),
    ('az://books', ['a.txt', 'c/b.jsonl', 'd,[1].txt']),
    ('az://books/*.txt', ['a.txt', 'd,[1].txt']),
    ('az://books/a.txt,az://books/c/*.jsonl', ['a.txt', 'c/b.jsonl']),
    ('az://books/d,[1].txt', ['d,[1].txt']),
  ],
)
def test_text_of_a_remote_store(pattern, wanted):
  found = documents.match(pattern)
  assert [document.name for document in found] == wanted
  for document in found:
    text = document.name.removeprefix('c/').encode()
    size = document.measure()
    assert text in b''.join(piece for piece, _ in document.read(0, size))
    assert document.num_file_bytes() > 0
    assert len(document.digest()) == 64


@pytest.mark.usefixtures('bucket')
@pytest.mark.parametrize(
  ('pattern', 'words'),
  [
    ('az://books/*.md', 'names no file'),
    ('az://nothing', 'names no file'),
    ('az://books/**/*.txt', r'cannot be reached \(Recursive'),
    ('ftp://books/a.txt', r'cannot be reached \(no scheme ftp://'),
    ('az://closed/a.txt', r'cannot be reached \(Forbidden'),
  ],
)
def test_what_a_store_lacks_is_named(pattern, words):
  with pytest.raises(UserError, match=words):
    documents.match(pattern)
