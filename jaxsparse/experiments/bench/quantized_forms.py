# SPDX-License-Identifier: Apache-2.0
"""The forms in which `quantized_loss` scores a model.

Rows of 3 bits and of 1 bit are no format: what they would cost is measured by
rounding alone. A table of zeros is the control: it says what the table is
worth. Embedding and output are in int8 with any dense form. The form of keys
and values is scored as decoding reads them, by a cache.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.inference.calibration import quantize_by_text
from jaxsparse.inference.quantize import (
  bytes_by_part,
  dequantized,
  map_leaves,
  parse,
  quantize,
)

_TABLES = ('value_table', 'pre_value_table')


@dataclasses.dataclass(frozen=True)
class Form:
  """How numbers are stored: as `--quantize=` has it, or a fake of tables."""

  how: str = ''
  by_text: bool = False
  # Whether attention reads keys and values of 8 bits, as decoding does.
  by_cache: bool = False
  # Numbers of rows as they would be read, and bytes of a row.
  rows: Callable[[np.ndarray], tuple[np.ndarray, int]] | None = None


def three_bits(rows: np.ndarray) -> tuple[np.ndarray, int]:
  """Numbers of -3 .. 3 in units of a third of the row's largest."""
  scale = np.abs(rows).max(1, keepdims=True) / 3
  codes = np.round(rows / np.where(scale == 0, 1, scale))
  return codes * scale, math.ceil(3 * rows.shape[1] / 8) + 4


def one_bit(rows: np.ndarray) -> tuple[np.ndarray, int]:
  """Signs, times the mean size of the row's numbers."""
  scale = np.abs(rows).mean(1, keepdims=True)
  return np.where(rows < 0, -scale, scale), math.ceil(rows.shape[1] / 8) + 4


def zeros(rows: np.ndarray) -> tuple[np.ndarray, int]:
  return np.zeros_like(rows), 0


FORMS = {
  'f32': Form(),
  'tables int8': Form('tables=int8'),
  'tables int4': Form('tables=int4'),
  'tables int4 clipped': Form('tables=int4,clip_search=true'),
  'tables 3 bits': Form(rows=three_bits),
  'tables 1 bit': Form(rows=one_bit),
  'tables zero': Form(rows=zeros),
  'dense int8': Form('weights=int8'),
  'dense int4': Form('weights=int4'),
  'dense int4 GPTQ': Form('weights=int4', by_text=True),
  'dense nf4': Form('weights=nf4'),
  'both int8': Form('weights=int8,tables=int8'),
  'dense int8 and tables int4': Form('weights=int8,tables=int4'),
  'both int4': Form('weights=int4,tables=int4'),
  'KV int8': Form(by_cache=True),
}


def applied(
  form: Form, config: ModelConfig, params: dict, sequences: np.ndarray
) -> tuple[dict, dict[str, int]]:
  """The model's numbers in a form, and the bytes of its two parts."""
  table_bytes = 0
  if form.rows is not None:
    of_rows = form.rows

    def on_leaf(path, x):
      nonlocal table_bytes
      if path[-1] not in _TABLES:
        return x
      numbers, row_bytes = of_rows(np.asarray(x))
      table_bytes += len(x) * row_bytes
      return numbers

    numbers = map_leaves(on_leaf, params)
    parts = bytes_by_part(params) | dict(tables=table_bytes)
  else:
    how = parse(form.how)
    if form.by_text:
      stored = quantize_by_text(config, params, how, sequences)
    else:
      stored = quantize(config, params, how)
    numbers, parts = dequantized(stored), bytes_by_part(stored)
  table_bytes = parts.pop('tables', 0)
  return numbers, dict(table_bytes=table_bytes, dense_bytes=sum(parts.values()))
