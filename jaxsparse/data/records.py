# SPDX-License-Identifier: Apache-2.0
"""Files of records, each a document: JSON lines and parquet."""

import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxsparse.config.errors import UserError
from jaxsparse.data import formats

ENDINGS = ('.jsonl', '.ndjson', '.parquet')

# Rows decoded at a time, of which each may be a whole book.
_ROWS = 64

# What messages call values that are no text.
_KINDS = {
  type(None): 'null',
  bool: 'a truth value',
  int: 'a number',
  float: 'a number',
  str: 'a string',
  list: 'a list',
  dict: 'an object',
}


def read(raw: io.IOBase, path: pathlib.PurePath, field: str) -> Iterator[bytes]:
  """The text of each record in UTF-8, in order.

  Args:
    raw: the file as it is.
    path: its ending names the format; errors name it.
    field: of the text in each record.

  Raises:
    UserError: a record is broken or has no text, or a package is missing.
  """
  is_parquet = formats.ending(path) == '.parquet'
  lines = parquet_rows if is_parquet else _json_fields
  for place, text in lines(raw, path, field):
    if not isinstance(text, str):
      raise UserError(
        f'{field!r} in {place} of {str(path)!r} is {_kind(text)}, no text: '
        'name another field in data.text_field, or leave that out.'
      )
    try:
      yield text.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f'{field!r} in {place} of {str(path)!r} holds half a character '
        f'({text[error.start]!r}): repair it, or leave that out.'
      ) from error


def json_object(line: bytes) -> dict[str, Any]:
  """The JSON object that the line is as a whole; empty if it is none."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return {}
  return record if isinstance(record, dict) else {}


def json_lines(
  raw: io.IOBase, path: pathlib.PurePath
) -> Iterator[tuple[str, Any]]:
  """What each line is in JSON, behind its place, such as 'line 3'.

  Raises:
    UserError: a line is no JSON.
  """
  for number, line in enumerate(formats.open_text(raw, path), 1):
    if not line.strip():
      continue
    place = f'line {number:,}'
    try:
      # Left to itself, `json` takes other encodings too.
      record = json.loads(line.decode())
    except UnicodeDecodeError as error:
      raise UserError(
        f'{place} of {str(path)!r} is not UTF-8: convert it, or leave it out.'
      ) from error
    except (ValueError, RecursionError) as error:
      raise UserError(
        f'{place} of {str(path)!r} is no JSON ({_reason(error)}): repair it, '
        'or leave it out.'
      ) from error
    yield place, record


def _json_fields(
  raw: io.IOBase, path: pathlib.PurePath, field: str
) -> Iterator[tuple[str, Any]]:
  for place, record in json_lines(raw, path):
    if not isinstance(record, dict):
      raise UserError(
        f'{place} of {str(path)!r} is {_kind(record)}, no JSON object: give '
        f'one object a line, with its text in a field {field!r}.'
      )
    _require_field(place, path, field, list(record), 'data.text_field')
    yield place, record[field]


def parquet_rows(
  raw: io.IOBase,
  path: pathlib.PurePath,
  field: str,
  setting: str = 'data.text_field',
) -> Iterator[tuple[str, Any]]:
  """A column's value in each row, behind its place, such as 'row 3'.

  Args:
    raw: the file as it is.
    path: for errors.
    field: name of the column.
    setting: that names it; '' if none does.

  Raises:
    UserError: the file is broken or has no such column.
  """
  # It takes half a second to import.
  import pyarrow
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(raw)
    columns = file.schema_arrow.names
    _require_field('the schema', path, field, columns, setting)
    row = 0
    for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
      for text in batch.column(0):
        row += 1
        yield f'row {row:,}', text.as_py()
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise UserError(
      f'{str(path)!r} is no sound parquet file ({str(error).splitlines()[0]}): '
      'repair it, or leave it out of data.text.'
    ) from error


def _require_field(
  place: str,
  path: pathlib.PurePath,
  field: str,
  fields: list[str],
  setting: str,
) -> None:
  if field not in fields:
    others = ', '.join(fields) or 'it has none'
    advice = f'name one of its fields in {setting} ({others})'
    raise UserError(
      f'{place} of {str(path)!r} has no field {field!r}: '
      + (f'{advice}.' if setting else f'rename one of its own ({others}).')
    )


def _reason(error: Exception) -> str:
  if not isinstance(error, json.JSONDecodeError):
    return str(error)
  # Its own message counts lines within the line.
  return f'{error.msg.removesuffix(" at")} at column {error.colno}'


def _kind(value: Any) -> str:
  return _KINDS.get(type(value), type(value).__name__)
