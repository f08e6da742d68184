# SPDX-License-Identifier: Apache-2.0
"""Pieces of documents to packed rows of tokens and their targets."""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from jaxsparse.data.pieces import Answers, Piece
from jaxsparse.data.tokenizer import Tokenizer

# Arrays of one length, by their names.
Sequence = dict[str, np.ndarray]

# Rows that are filled at once where no piece may go on in the next.
_OPEN_ROWS = 8


def shifted(piece: Piece | Answers, tokenizer: Tokenizer) -> Sequence:
  """One piece's tokens, each beside the token that comes after it.

  Shifted before packing, every token of the corpus is a target exactly once,
  wherever rows end. A document's last piece has the boundary as its last
  target.

  Returns:
    'tokens' and 'targets', int32 [n] each; of a chat also 'loss_weight',
    float32 [n], which is 1 where the target is of an answer and else 0.
  """
  if isinstance(piece, Answers):
    return dict(
      tokens=piece.tokens[:-1],
      targets=piece.tokens[1:],
      loss_weight=piece.is_learned[1:].astype(np.float32),
    )
  begin, boundary = [tokenizer.begin_id], [tokenizer.boundary_id]
  tokens = tokenizer.encode(piece.text.decode('utf-8', 'replace'))
  sequence = np.concatenate(
    [begin, tokens, boundary if piece.ends_document else []]
  ).astype(np.int32)
  return dict(tokens=sequence[:-1], targets=sequence[1:])


def num_targets(piece: Piece | Answers, tokenizer: Tokenizer) -> int:
  """How many of its tokens have a weight in the loss."""
  sequence = shifted(piece, tokenizer)
  weight = sequence.get('loss_weight')
  return len(sequence['targets']) if weight is None else int(weight.sum())


def packed(
  pieces: grain.MapDataset,
  tokenizer: Tokenizer,
  seq_len: int,
  align: int = 1,
  *,
  are_chats: bool = False,
) -> grain.IterDataset:
  """Rows that `seq_len` tokens fill without gaps; long pieces go on.

  Segments count from 1 and positions from 0 within a row, so a piece that
  goes on in the next row is a segment of its own there. With `align`, a divisor
  of `seq_len`, pieces begin at multiples of it, after padding of segment 0.

  Of chats, each lies in one row as a whole, as an answer without its question
  teaches nothing; padding fills what they leave.
  """
  sequences = pieces.map(lambda piece: shifted(piece, tokenizer))
  arrays = ['tokens', 'targets'] + ['loss_weight'] * are_chats
  if align > 1:
    sequences = sequences.map(lambda sequence: _aligned(sequence, align))
    arrays.append('is_token')
  # The rows are made in a thread of their own already.
  sequences = sequences.to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )
  lengths = dict.fromkeys(arrays, seq_len)
  if are_chats:
    rows = grain.experimental.FirstFitPackIterDataset(
      sequences,
      length_struct=lengths,
      num_packing_bins=_OPEN_ROWS,
      shuffle_bins=False,
    )
  else:
    rows = grain.experimental.ConcatThenSplitIterDataset(
      sequences, length_struct=lengths
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
    loss_weight=(segment_ids > 0) * np.float32(row.get('loss_weight', 1)),
  )


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
