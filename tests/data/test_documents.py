"""Files as documents, cut into pieces and given to splits."""

import gzip
import io

import numpy as np
import pytest

from jaxsparse.config import DataConfig
from jaxsparse.data import documents, pieces, python_text
from jaxsparse.errors import UserError

TEXT = 'naïve café 🙂 日本語\n'


def _documents(*sizes: int) -> list[documents.Document]:
  return [
    documents.Document(name=f'{i:03}.txt', content=b'x' * size)
    for i, size in enumerate(sizes)
  ]


def _split(documents_: list, **fields) -> documents.Splits:
  sizes = [documents.measure(document) for document in documents_]
  return documents.split(documents_, sizes, DataConfig(**fields))


def _num_bytes(spans: list) -> int:
  return sum(span.stop - span.start for span in spans)


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


def test_split_by_file_is_disjoint_whole_and_near_the_fraction():
  sizes = np.random.default_rng(0).integers(1, 2000, 300).tolist()
  splits = _split(
    _documents(*sizes), validation_fraction=0.1, test_fraction=0.2
  )
  names = [span.document.name for s in splits.values() for span in s]
  assert sorted(names) == [f'{i:03}.txt' for i in range(300)]
  assert _num_bytes(splits['validation']) == pytest.approx(
    0.1 * sum(sizes), rel=0.1
  )
  assert _num_bytes(splits['test']) == pytest.approx(0.2 * sum(sizes), rel=0.1)
  assert splits == _split(
    _documents(*sizes), validation_fraction=0.1, test_fraction=0.2
  )


def test_a_huge_file_stays_in_training():
  splits = _split(_documents(10**6, *[1000] * 50))
  assert '000.txt' in [span.document.name for span in splits['train']]
  assert splits['validation']


def test_a_new_file_moves_few_others():
  before = _split(_documents(*[100] * 200), validation_fraction=0.2)
  after = _split(_documents(*[100] * 201), validation_fraction=0.2)
  names = [{s.document.name for s in x['validation']} for x in (before, after)]
  assert len(names[0] ^ names[1]) <= 3


def test_split_by_bytes_is_contiguous_and_exact_like_enwik8():
  splits = _split(
    _documents(61_000, 39_000), split='bytes', validation_fraction=0.05,
    test_fraction=0.05,
  )  # fmt: skip
  spans = {
    name: [(s.document.name, s.start, s.stop, s.ends_document) for s in spans]
    for name, spans in splits.items()
  }
  assert spans == dict(
    train=[('000.txt', 0, 61_000, True), ('001.txt', 0, 29_000, False)],
    validation=[('001.txt', 29_000, 34_000, False)],
    test=[('001.txt', 34_000, 39_000, True)],
  )


def test_split_by_bytes_never_cuts_a_character():
  document = documents.Document(name='a', content='🙂'.encode() * 101)
  splits = _split([document], split='bytes', validation_fraction=0.3)
  assert sum(_num_bytes(spans) for spans in splits.values()) == 404
  assert all(s.start % 4 == s.stop % 4 == 0 for x in splits.values() for s in x)


@pytest.mark.parametrize(
  ('sizes', 'fields', 'words'),
  [
    ((0, 0), {}, 'empty files'),
    ((), {}, 'empty files'),
    ((1000,), {}, 'too small for a validation split'),
    ((1000, 1000), dict(test_fraction=0.1), 'too small for a test split'),
    ((4,), dict(split='bytes'), 'too small for a validation split'),
  ],
)
def test_too_little_text_is_refused(sizes, fields, words):
  with pytest.raises(UserError, match=words):
    _split(_documents(*sizes), **fields)


def test_globs_name_files_below_their_common_directory(tmp_path):
  (tmp_path / 'b').mkdir()
  for name in ('a.txt', 'b/c.txt', 'd.md'):
    (tmp_path / name).write_text(name)
  patterns = f'{tmp_path}/**/*.txt, {tmp_path}/d.*,{tmp_path}/a.txt'
  found = documents.match(patterns)
  assert [document.name for document in found] == ['a.txt', 'b/c.txt', 'd.md']


@pytest.mark.parametrize('pattern', ['{}/*.txt', '{}', '{}/a,{}/*.md', ' , '])
def test_a_glob_without_files_is_refused(tmp_path, pattern):
  (tmp_path / 'a').write_text('text')
  with pytest.raises(UserError, match='names no file'):
    documents.match(pattern.format(tmp_path, tmp_path))


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
  with pytest.raises(UserError, match=rf'latin1.txt .* at byte {offset}:'):
    documents.measure(document)


def test_gzip_files_are_read_unpacked(tmp_path):
  path = tmp_path / 'text.gz'
  path.write_bytes(gzip.compress(TEXT.encode()))
  document = documents.Document(name='text.gz', path=path)
  assert documents.measure(document) == len(TEXT.encode())
  path.write_bytes(path.read_bytes()[:-12])
  with pytest.raises(UserError, match=r'text.gz cannot be read'):
    documents.measure(document)


def test_python_carries_its_own_text():
  found = python_text.documents()
  names = [document.name for document in found]
  assert names == sorted(set(names))
  assert {'os.py', 'json/decoder.py', 'pydoc_data/assert.txt'} <= set(names)
  assert not [n for n in names if {'test', 'tests'} & set(n.split('/'))]
  assert not [n for n in names if '_sysconfigdata' in n or 'topics.py' in n]
  assert found == python_text.documents()
