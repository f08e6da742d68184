# SPDX-License-Identifier: Apache-2.0
"""Pairs in tar files as webdataset has them."""

import io
import json
import tarfile

import numpy as np
import pairs
import pytest

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pictures import decode
from jaxsparse.data.pictures.tar import Tar

PAIR = {'a.png': pairs.png(0), 'a.txt': b'first\n'}


def test_text_and_json_beside_pictures(tmp_path):
  path = pairs.write_tar(
    tmp_path / 'x.tar',
    PAIR
    | {
      'folder/b.c.json': b'{}',
      'folder/b.json': json.dumps(
        dict(captions=['second', '2nd'], group='g')
      ).encode(),
      'folder/b.JPG': pairs.png(1),
      # Where both are, the text is the caption.
      'c.json': b'{"url": "x"}',
      'c.txt': '\ufefffünf'.encode(),
      'c.webp': pairs.png(2),
      'c.cls': b'7',
      '.hidden': b'',
      'readme': b'',
    },
  )
  tar = Tar([path])
  assert [(p.name, p.captions, p.group) for p in tar.pairs] == [
    ('a', ('first',), ''),
    ('folder/b', ('second', '2nd'), 'g'),
    ('c', ('fünf',), ''),
  ]
  for i in range(3):
    np.testing.assert_array_equal(
      tar.picture(i, 8), decode.read_picture(pairs.png(i), 8)
    )


def test_several_files_by_folder_and_by_pattern(tmp_path):
  for i in range(4):
    files = {f'{i}{j}.png': pairs.png(10 * i + j) for j in range(3)} | {
      f'{i}{j}.txt': b'%d %d' % (i, j) for j in range(3)
    }
    pairs.write_tar(tmp_path / f'{i}.tar', files)
  keys = set()
  for where in (tmp_path, tmp_path / '?.tar'):
    config = DataConfig(pairs=str(where), cache_dir=str(tmp_path / 'cache'))
    corpus = build_corpus(config, lambda _: None)
    assert len(corpus.train) + len(corpus.validation) == 12
    keys.add(corpus.key)
  assert len(keys) == 1


@pytest.mark.parametrize(
  ('files', 'words'),
  [
    ({'a.png': b'x'}, r"'a' in .*x.tar' has no caption \(.txt or .json\)"),
    ({'a.txt': b'x'}, "'a' in .*x.tar' has no picture"),
    (PAIR | {'a.jpg': b'x'}, "'a' in .* has two .*'a.png' and 'a.jpg'"),
    (PAIR | {'a.txt': b' '}, "'a.txt' in .* is empty"),
    (PAIR | {'a.txt': b'\xff\xfe'}, "'a.txt' in .* is not UTF-8"),
    (PAIR | {'a.txt': b'x' * (1 << 21)}, r'has 2,097,152 bytes, no caption'),
    ({'a.png': b'x', 'a.json': b'{'}, "'a.json' in .* is no JSON"),
    ({'a.png': b'x', 'a.json': b'{}'}, '\'a.json\' in .* has no "caption"'),
    ({'readme.md': b'x'}, 'holds no pairs: give a folder'),
  ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, files, words):
  path = pairs.write_tar(tmp_path / 'x.tar', files)
  config = DataConfig(pairs=str(path), cache_dir=str(tmp_path / 'cache'))
  with pytest.raises(UserError, match=words) as error:
    build_corpus(config, print)
  assert '\n' not in str(error.value)


def test_a_key_in_two_files_is_refused(tmp_path):
  for name in 'xy':
    pairs.write_tar(tmp_path / f'{name}.tar', PAIR)
  with pytest.raises(UserError, match=r"'a' in .*y.tar' is in .*x.tar' too"):
    Tar([tmp_path / 'x.tar', tmp_path / 'y.tar'])


def test_what_is_no_whole_tar_is_refused(tmp_path):
  whole = pairs.write_tar(tmp_path / 'x.tar', PAIR).read_bytes()
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode='w:gz') as tar:
    tar.addfile(tarfile.TarInfo('a.txt'))
  for content in (b'nothing of the kind' * 99, packed.getvalue(), whole[:700]):
    (tmp_path / 'x.tar').write_bytes(content)
    with pytest.raises(UserError, match=r"x.tar' is no whole tar file"):
      Tar([tmp_path / 'x.tar'])


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
  """Between pairs, in a header, in a picture: nothing of it is lost."""
  files = PAIR | {'b.png': pairs.png(1), 'b.txt': b'second'}
  whole = pairs.write_tar(tmp_path / 'x.tar', files).read_bytes()
  with tarfile.open(tmp_path / 'x.tar') as tar:
    entries = tar.getmembers()
    end = tar.offset
  path = tmp_path / 'cut.tar'
  starts = [entry.offset for entry in entries[1:]]
  cuts = [*starts, *(at + 99 for at in starts), entries[2].offset_data + 9, end]
  for cut in cuts:
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"cut.tar' is no whole tar file"):
      Tar([path])
  # Nor what was written into it, or behind it.
  for at in (starts[1], end):
    path.write_bytes(whole[:at] + b'x' * 512 + whole[at + 512 :])
    with pytest.raises(UserError, match=f'no file begins at byte {at:,}'):
      Tar([path])
  path.write_bytes(whole[: end + 512])
  assert len(Tar([path]).pairs) == 2


def test_pictures_of_no_pair_are_counted(tmp_path):
  more = {
    'a.mask.png': b'', 'b.0.1.png': b'', 'b.0.1.txt': b'', 'c/b.2.JPG': b'',
  }  # fmt: skip
  said = []
  tar = Tar([pairs.write_tar(tmp_path / 'x.tar', PAIR | more)], said.append)
  assert [pair.name for pair in tar.pairs] == ['a']
  (line,) = said
  assert "x.tar' that are left out: 2, such as 'b.0.1.png', as a key" in line


def test_a_file_that_is_cut_later_is_named(tmp_path):
  path = pairs.write_tar(tmp_path / 'x.tar', PAIR)
  tar = Tar([path])
  path.write_bytes(path.read_bytes()[:520])
  with pytest.raises(UserError, match='it ends too early'):
    tar.picture(0, 8)


def test_links_are_no_pictures(tmp_path):
  """Nothing outside of the file is read."""
  path = tmp_path / 'x.tar'
  with tarfile.open(path, 'w') as tar:
    entry = tarfile.TarInfo('a.png')
    entry.type, entry.linkname = tarfile.SYMTYPE, '/etc/hostname'
    tar.addfile(entry)
    entry = tarfile.TarInfo('a.txt')
    entry.size = 1
    tar.addfile(entry, io.BytesIO(b'x'))
  with pytest.raises(UserError, match='has no picture'):
    Tar([path])
