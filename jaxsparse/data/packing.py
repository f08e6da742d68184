# SPDX-License-Identifier: Apache-2.0
"""Pieces of documents to packed rows of tokens and their targets."""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from jaxsparse.data.pieces import Piece
from jaxsparse.data.tokenizer import Tokenizer


def shifted(piece: Piece, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """One piece's tokens, each beside the token that comes after it.

  Shifted before packing, every token of the corpus is a target exactly once,
  wherever rows end. A document's last piece has the boundary as its last
  target.

  Returns:
    'tokens' and 'targets', int32[n] each.
  """
  begin, boundary = [tokenizer.begin_id], [tokenizer.boundary_id]
  tokens = tokenizer.encode(piece.text.decode('utf-8', 'replace'))
  sequence = np.concatenate(
    [begin, tokens, boundary if piece.ends_document else []]
  ).astype(np.int32)
  return dict(tokens=sequence[:-1], targets=sequence[1:])


def packed(
  pieces: grain.MapDataset, tokenizer: Tokenizer, seq_len: int, align: int = 1
) -> grain.IterDataset:
  """Rows that `seq_len` tokens fill without gaps; long pieces go on.

  Segments count from 1 and positions from 0 within a row, so a piece that
  goes on in the next row is a segment of its own there. With `align`, a divisor
  of `seq_len`, pieces begin at multiples of it, after padding of segment 0.
  """
  sequences = pieces.map(lambda piece: shifted(piece, tokenizer))
  arrays = ['tokens', 'targets']
  if align > 1:
    sequences = sequences.map(lambda sequence: _aligned(sequence, align))
    arrays.append('is_token')
  rows = grain.experimental.ConcatThenSplitIterDataset(
    # The rows are made in a thread of their own already.
    sequences.to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ),
    length_struct=dict.fromkeys(arrays, seq_len),
  )
  return rows.map(_row)


def _aligned(sequence, multiple):
  length = len(sequence['tokens'])
  padding = (0, -length % multiple)
  sequence = dict(sequence, is_token=np.ones(length, np.int32))
  return {name: np.pad(x, padding) for name, x in sequence.items()}


def _row(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
  segment_ids = row['tokens_segment_ids'] * row.get('is_token', 1)
  return dict(
    tokens=row['tokens'],
    targets=row['targets'],
    positions=row['tokens_positions'],
    segment_ids=segment_ids,
    loss_weight=(segment_ids > 0).astype(np.float32),
  )


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
