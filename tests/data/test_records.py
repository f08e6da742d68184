# SPDX-License-Identifier: Apache-2.0
"""Files of records: JSON lines and parquet."""

import gzip
import json
import pathlib

import pyarrow
import pytest
from pyarrow import parquet

from jaxsparse.config.errors import UserError
from jaxsparse.data import documents

TEXTS = ['naïve 🙂\n', '', 'x' * 20_000, 'one\r\ntwo', 'last']


def _json_lines(path: pathlib.Path, records: list) -> None:
  # Blank lines and Windows' line ends are no records.
  lines = '\r\n\n'.join(json.dumps(record) for record in records)
  content = lines.encode()
  if path.suffix.lower() == '.gz':
    content = gzip.compress(content)
  path.write_bytes(content)


def _parquet(path: pathlib.Path, records: list) -> None:
  table = pyarrow.Table.from_pylist(records)
  parquet.write_table(table, path, row_group_size=2)


WRITERS = {
  'a.jsonl': _json_lines,
  'a.NDJSON': _json_lines,
  'a.jsonl.gz': _json_lines,
  'a.json': _json_lines,
  'a.json.GZ': _json_lines,
  'a.parquet': _parquet,
  'a.snappy.Parquet': _parquet,
}


def _records(path: pathlib.Path, records: list, **fields):
  WRITERS[path.name](path, records)
  return documents.match(str(path), **fields)[0]


@pytest.mark.parametrize('name', WRITERS)
def test_each_record_is_a_document(tmp_path, name):
  records = [dict(id=i, body=text) for i, text in enumerate(TEXTS)]
  document = _records(tmp_path / name, records, text_field='body')
  whole = ''.join(TEXTS).encode()
  assert document.measure() == len(whole)
  texts, text = [], b''
  for piece, ends_document in document.read(0, len(whole)):
    assert 0 < len(piece) <= 8192
    text += piece
    if ends_document:
      texts.append(text.decode())
      text = b''
  assert texts == [text for text in TEXTS if text]
  assert not text


def test_a_span_of_records(tmp_path):
  """Every byte once; what is cut does not end."""
  document = _records(tmp_path / 'a.jsonl', [dict(text=t) for t in TEXTS])
  whole = ''.join(TEXTS).encode()
  stops = [0]
  for text in TEXTS:
    stops.append(stops[-1] + len(text.encode()))
  for cut in (1, stops[1] - 1, stops[1], stops[1] + 1, stops[-2], stops[-1]):
    first = list(document.read(0, cut))
    rest = list(document.read(cut, len(whole)))
    assert b''.join(piece for piece, _ in first + rest) == whole
    assert first[-1][1] == (cut in stops)
    assert sum(ends for _, ends in first + rest) == 4


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.parquet'])
@pytest.mark.parametrize(
  ('record', 'words'),
  [
    (dict(text=None, id=3), "'text' in (line|row) . of .*' is null, no text"),
    (dict(id=3), "(no field 'text'.*id|is null, no text)"),
  ],
)
def test_a_record_without_text_is_named(tmp_path, name, record, words):
  document = _records(tmp_path / name, [dict(text='good', id=0), record])
  with pytest.raises(UserError, match=words) as error:
    document.measure()
  assert name in str(error.value)


def test_a_column_that_is_missing_or_no_text_is_named(tmp_path):
  records = [dict(body='good', stars=3, tags=['a'])]
  for field, words in (
    ('text', r'no field .text.: .*\(body, stars, tags\)'),
    ('stars', "'stars' in row 1 of .* is a number, no text"),
    ('tags', "'tags' in row 1 of .* is a list, no text"),
  ):
    document = _records(tmp_path / 'a.parquet', records, text_field=field)
    with pytest.raises(UserError, match=words):
      document.measure()


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    (b'{"text": "cut', "line 3 of .*a.jsonl' is no JSON .Invalid .* at col"),
    (b'{"text": 7}', "'text' in line 3 of .* is a number, no text"),
    (b'{"body": "b", "id": 1}', r'line 3 of .* no field .* \(body, id\)'),
    (b'{}', 'no field .text.: .*it has none'),
    (b'["text"]', 'line 3 of .* is a list, no JSON object'),
    (b'"text"', 'line 3 of .* is a string, no JSON object'),
    (b'{"text": "\xe9"}', 'line 3 of .* is not UTF-8'),
    (rb'{"text": "a\ud83d"}', 'line 3 of .* half a character'),
    (b'[' * 100_000, 'line 3 of .* is no JSON'),
    (b'{"text": "a", "n": ' + b'9' * 5000 + b'}', 'line 3 of .* is no JSON'),
  ],
  ids=range(10),
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, words):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\xef\xbb\xbf{"text": "good"}\n\n' + line + b'\n')
  document = documents.match(str(path))[0]
  with pytest.raises(UserError, match=words) as error:
    document.measure()
  assert '\n' not in str(error.value)
  str(error.value).encode()


@pytest.mark.parametrize(
  'damage', [lambda c: c[:-9], lambda c: c[9:], lambda c: b'', lambda c: b'x']
)
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
  path = tmp_path / 'a.parquet'
  _parquet(path, [dict(text='good')])
  path.write_bytes(damage(path.read_bytes()))
  document = documents.match(str(path))[0]
  with pytest.raises(UserError, match=r"a.parquet' (is no sound|cannot be)"):
    document.measure()


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
  _parquet(tmp_path / 'a.parquet', [dict(text='x' * 100)] * 300)
  rows = []
  read = parquet.ParquetFile.iter_batches

  def watched(*args, **kwargs):
    for batch in read(*args, **kwargs):
      rows.append(len(batch))
      yield batch

  monkeypatch.setattr(parquet.ParquetFile, 'iter_batches', watched)
  document = documents.match(str(tmp_path / 'a.parquet'))[0]
  next(document.read(0, 30_000))
  assert sum(rows) <= 64


@pytest.mark.parametrize(
  ('name', 'content', 'looks'),
  [
    ('a.json', '{"name": "x"}\n', True),
    ('a.json', '[{"text": "x"}]\n', True),
    ('a.json', '{\n  "text": "x"\n}\n', True),
    ('a.txt', '{"text": "x"}\n{"text": "y"}\n', True),
    ('a.txt', '{x} and so on\n', False),
    ('a.txt', '', False),
    ('a.json', '{"text": "x"}\n', False),
    ('a.jsonl', '{"text": "x"}\n', False),
  ],
)
def test_plain_text_that_looks_like_json_is_known(
  tmp_path, name, content, looks
):
  (tmp_path / name).write_text(content)
  document = documents.match(str(tmp_path / name))[0]
  assert document.looks_like_json() == looks
  assert bool(document.text_field) == (not looks and 'json' in name)
