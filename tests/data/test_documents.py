# SPDX-License-Identifier: Apache-2.0
"""Files as documents, decoded and cut into pieces."""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import os
import pathlib
import tarfile

import pyarrow
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.data import documents, pieces, python_text

TEXT = 'naïve café 🙂 日本語\n'


@pytest.mark.parametrize('size', [4, 5, 7, 16, 1000])
@pytest.mark.parametrize(
  'text', [TEXT * 9, '🙂' * 50, 'é' * 33 + '\n', 'a'], ids=range(4)
)
def test_pieces_are_whole_characters_and_make_up_the_text(text, size):
  content = text.encode()
  cut = list(pieces.cut(io.BytesIO(content + b'more'), len(content), size))
  assert b''.join(piece for piece, _ in cut) == content
  assert all(0 < len(piece) <= size for piece, _ in cut)
  assert [is_last for _, is_last in cut] == [False] * (len(cut) - 1) + [True]
  for piece, _ in cut:
    piece.decode()


def test_pieces_end_at_a_newline_where_their_second_half_has_one():
  content = b'0123\n56\n890123456789'
  cut = [piece for piece, _ in pieces.cut(io.BytesIO(content), 20, 10)]
  assert cut == [b'0123\n56\n', b'8901234567', b'89']


def test_no_bytes_give_no_piece():
  assert list(pieces.cut(io.BytesIO(b''), 0)) == []


@pytest.mark.parametrize(
  ('content', 'offset'),
  [
    (b'\xff', 0),
    (b'abc\xe9 def', 3),
    (b'abc\xf0\x9f\x99', 3),
    (b'x' * ((1 << 20) - 2) + b'\xf0\x9f\x99 x', (1 << 20) - 2),
  ],
)
def test_a_file_that_is_not_utf8_is_refused(tmp_path, content, offset):
  path = tmp_path / 'latin1.txt'
  path.write_bytes(content)
  document = documents.Document(name='latin1.txt', path=path)
  with pytest.raises(UserError, match=rf"latin1.txt' .* at byte {offset}:"):
    document.measure()


def _zstandard(content: bytes) -> bytes:
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, 'zstd') as stream:
    stream.write(content)
  return sink.getvalue().to_pybytes()


PACKED = {
  'a.txt': bytes,
  'a.TXT': bytes,
  'a': bytes,
  'a.gz': gzip.compress,
  'a.txt.GZ': gzip.compress,
  'a.bz2': bz2.compress,
  'a.xz': lzma.compress,
  'a.zst': _zstandard,
}
# More than any reader holds at once.
LONG = TEXT * 40_000


def _file(path: pathlib.Path, content: bytes) -> documents.Document:
  path.write_bytes(content)
  return documents.match(str(path))[0]


def _read(document: documents.Document, *span: int) -> bytes:
  return b''.join(piece for piece, _ in document.read(*span))


@pytest.mark.parametrize('mark', [b'', codecs.BOM_UTF8], ids=['', 'BOM'])
@pytest.mark.parametrize('name', PACKED)
def test_text_is_read_unpacked_without_a_mark(tmp_path, name, mark):
  content = LONG.encode()
  document = _file(tmp_path / name, PACKED[name](mark + content))
  assert document.measure() == len(content)
  for start, stop in ((0, len(content)), (0, 4), (1_100_000, 1_100_009)):
    assert _read(document, start, stop) == content[start:stop]
  ends = [ends for _, ends in document.read(0, len(content))]
  assert ends == [False] * (len(ends) - 1) + [True]
  assert not any(ends for _, ends in document.read(0, len(content) - 1))


@pytest.mark.parametrize('name', [n for n in PACKED if PACKED[n] is not bytes])
def test_a_cut_file_is_refused(tmp_path, name):
  content = PACKED[name](TEXT.encode())
  document = _file(tmp_path / name, content[:-9])
  with pytest.raises(UserError, match=rf"{name}' cannot be read"):
    document.measure()
  document = _file(tmp_path / name, b'not what its name says')
  with pytest.raises(UserError, match=rf"{name}' cannot be read"):
    document.measure()


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.txt.gz'])
@pytest.mark.parametrize(
  ('mark', 'encoding', 'called'),
  [
    (codecs.BOM_UTF16_LE, 'utf-16-le', 'UTF-16'),
    (codecs.BOM_UTF16_BE, 'utf-16-be', 'UTF-16'),
    (codecs.BOM_UTF32_LE, 'utf-32-le', 'UTF-32'),
    (codecs.BOM_UTF32_BE, 'utf-32-be', 'UTF-32'),
  ],
)
def test_other_encodings_are_named(tmp_path, name, mark, encoding, called):
  pack = PACKED.get(name.replace('.txt', ''), bytes)
  document = _file(tmp_path / name, pack(mark + TEXT.encode(encoding)))
  with pytest.raises(UserError, match=rf"{name}' is {called}, not UTF-8"):
    document.measure()


def test_utf16_without_a_mark_and_archives_are_refused(tmp_path):
  document = _file(tmp_path / 'a.txt', ('To be. ' * 99).encode('utf-16-le'))
  with pytest.raises(UserError, match='NUL bytes'):
    document.measure()
  (tmp_path / 'a.txt').write_text('To be. ' * 99)
  with tarfile.open(tmp_path / 'b.tar.gz', 'w:gz') as archive:
    archive.add(tmp_path / 'a.txt')
  with pytest.raises(UserError, match='archives do'):
    documents.match(str(tmp_path / 'b.tar.gz'))[0].measure()


def test_a_carriage_return_is_kept(tmp_path):
  for name, content in (
    ('a.txt', b'one\r\ntwo\rthree\n'),
    ('a.jsonl', b'{"text": "one\\r\\ntwo\\rthree\\n"}\r\n'),
  ):
    document = _file(tmp_path / name, content)
    assert _read(document, 0, 16) == b'one\r\ntwo\rthree\n'


def test_names_may_be_any_bytes(tmp_path):
  """What is no UTF-8 in a name is in a digest and in a message, too."""
  name = os.fsdecode(b'caf\xe9.txt')
  found = _file(tmp_path / name, b'')
  assert found.name == name
  assert found.digest() == hashlib.sha256().hexdigest()
  document = _file(tmp_path / name, b'\xff')
  with pytest.raises(UserError, match='is not UTF-8') as error:
    document.measure()
  str(error.value).encode()


def test_python_carries_its_own_text():
  found = python_text.documents()
  names = [document.name for document in found]
  assert names == sorted(set(names))
  assert {'os.py', 'json/decoder.py', 'pydoc_data/assert.txt'} <= set(names)
  assert not [n for n in names if {'test', 'tests'} & set(n.split('/'))]
  assert not [n for n in names if '_sysconfigdata' in n or 'topics.py' in n]
  assert found == python_text.documents()
