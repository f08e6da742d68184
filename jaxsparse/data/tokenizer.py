# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: bytes, byte-pair encoding, SentencePiece.

Every tokenizer has one boundary token: the target behind a document's last
one. It stands before a document's first token, too, unless the vocabulary has
another token for that. No text encodes to them, and they decode to nothing.
"""

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from etils import epath

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import byte_pairs, spelling, words
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer_roles import BOUNDARIES, Roles
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.workdir import expanded, write_whole

JSON_NAME, SENTENCEPIECE_NAME = workdir_lib.TOKENIZERS

Ids = Iterable[Any]
Workdir = str | pathlib.PurePath


@runtime_checkable
class Tokenizer(Protocol):
  """What training, inference and analysis need to know of a tokenizer."""

  vocab_size: int
  # What ends a document.
  boundary_id: int
  # What stands before a document's first token.
  begin_id: int
  # What ends an answer: of chats first, then of documents.
  stop_ids: tuple[int, ...]
  # Tokens by the texts that stand for them in templates of chats.
  markers: Mapping[str, int]

  def encode(self, text: str, has_markers: bool = False) -> np.ndarray:
    """The text's tokens, int32[n], without boundaries.

    Args:
      text: any.
      has_markers: whether markers that it spells out become their tokens. In
        what a user wrote they are text like any other.
    """

  def decode(self, ids: Ids) -> str:
    """The tokens' text, with U+FFFD where it is not UTF-8."""

  def decode_bytes(self, ids: Ids) -> bytes:
    """The tokens' bytes: of all tokens together, those of each in turn."""

  def unknown(self, text: str) -> list[str]:
    """Parts of a text that all become one token, which stands for unknown."""

  def save(self, workdir: Workdir) -> None:
    """Writes what `load_from_workdir` reads."""


class ByteTokenizer:
  """One token for each byte of UTF-8."""

  vocab_size = 257
  boundary_id = begin_id = 256
  stop_ids = (256,)
  markers: Mapping[str, int] = {}

  def encode(self, text: str, has_markers: bool = False) -> np.ndarray:
    # Surrogates stand for bytes that were no UTF-8 when Python read them.
    content = text.encode('utf-8', 'surrogateescape')
    return np.frombuffer(content, np.uint8).astype(np.int32)

  def decode(self, ids: Ids) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def decode_bytes(self, ids: Ids) -> bytes:
    return bytes(i for i in _as_list(ids) if i < 256)

  def unknown(self, text: str) -> list[str]:
    return []

  def save(self, workdir: Workdir) -> None:
    _write(workdir, JSON_NAME, json.dumps(dict(jaxsparse='bytes')).encode())


class JsonTokenizer:
  """A tokenizer.json, as the `tokenizers` library writes it."""

  def __init__(
    self, tokenizer: tokenizers.Tokenizer, roles: Roles | None = None
  ):
    """Takes the tokenizer over.

    Args:
      tokenizer: gets a boundary where it has none.
      roles: of its tokens, if it was published with them.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = _begins_with(tokenizer)
    roles = roles or Roles(adds_bos=False)
    names = {*BOUNDARIES, roles.eos, roles.bos} - {None}
    ids = {name: tokenizer.token_to_id(name) for name in names}
    ids = {name: i for name, i in ids.items() if i is not None}
    boundary_id = roles.boundary(ids)
    if boundary_id is None:
      tokenizer.add_special_tokens([BOUNDARIES[0]])
      boundary_id = tokenizer.token_to_id(BOUNDARIES[0])
    # A text that spells a special token out must not become that token.
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    self.boundary_id = boundary_id
    bos_id = ids.get(roles.bos)
    adds_bos = roles.adds_bos
    if adds_bos is None:
      adds_bos = bos_id is not None and bos_id == added
    self.begin_id = boundary_id if bos_id is None or not adds_bos else bos_id
    self.stop_ids = _unique(
      ids.get(roles.eos, boundary_id), *roles.stop_ids, boundary_id
    )
    # Identifiers may have gaps.
    self.vocab_size = max(tokenizer.get_vocab().values()) + 1

  def encode(self, text: str, has_markers: bool = False) -> np.ndarray:
    tokenizer = self._with_markers if has_markers else self._tokenizer
    encoding = tokenizer.encode(spelling.sound(text), add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def decode(self, ids: Ids) -> str:
    if 'ByteLevel' in self._decoder:
      return self.decode_bytes(ids).decode('utf-8', 'replace')
    # Other decoders join tokens by rules that look at their neighbours.
    ids = [i for i in _as_list(ids) if i not in self._silent]
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def decode_bytes(self, ids: Ids) -> bytes:
    return b''.join(self._byte_table.get(i, b'') for i in _as_list(ids))

  def unknown(self, text: str) -> list[str]:
    text = spelling.sound(text)
    return spelling.parts_of(self._tokenizer, self._unknown_id, text)

  def save(self, workdir: Workdir) -> None:
    _write(workdir, JSON_NAME, self._tokenizer.to_str().encode())

  @functools.cached_property
  def markers(self) -> Mapping[str, int]:
    added = self._tokenizer.get_added_tokens_decoder()
    return {x.content: i for i, x in added.items() if x.special}

  @functools.cached_property
  def _with_markers(self) -> tokenizers.Tokenizer:
    # Another one: threads encode at the same time.
    return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

  @functools.cached_property
  def _unknown_id(self) -> int | None:
    return spelling.unknown_id(self._tokenizer)

  @functools.cached_property
  def _silent(self) -> frozenset[int]:
    return frozenset({self.boundary_id, self.begin_id, *self.stop_ids})

  @functools.cached_property
  def _decoder(self) -> str:
    decoder = json.loads(self._tokenizer.to_str())['decoder']
    return json.dumps(decoder, ensure_ascii=False)

  @functools.cached_property
  def _byte_table(self) -> dict[int, bytes]:
    """Bytes of each token; the words of WordPiece come without spaces."""
    to_bytes = (
      spelling.byte_level_bytes
      if 'ByteLevel' in self._decoder
      else spelling.piece_bytes
    )
    vocab = self._tokenizer.get_vocab(with_added_tokens=False)
    table = {i: to_bytes(token) for token, i in vocab.items()}
    for i, token in self._tokenizer.get_added_tokens_decoder().items():
      table[i] = token.content.encode()
    return table | dict.fromkeys(self._silent, b'')


class SentencePieceTokenizer:
  """A SentencePiece model; its end-of-sentence token is the boundary."""

  def __init__(self, model: bytes, roles: Roles | None = None):
    """Raises UserError when the model has no end-of-sentence token."""
    processor = _sentencepiece()(model_proto=model)
    if processor.eos_id() < 0:
      raise UserError(
        'data.tokenizer names a SentencePiece model without an '
        'end-of-sentence token: train it with --eos_id set.'
      )
    self._model = model
    self._processor = processor
    self.vocab_size = processor.vocab_size()
    self.boundary_id = self.begin_id = processor.eos_id()
    roles = roles or Roles(adds_bos=False)
    # Published models were trained so unless they say otherwise.
    if roles.adds_bos is not False and processor.bos_id() >= 0:
      self.begin_id = processor.bos_id()
    self.stop_ids = _unique(
      self.markers.get(roles.eos or '', self.boundary_id),
      *roles.stop_ids,
      self.boundary_id,
    )

  def encode(self, text: str, has_markers: bool = False) -> np.ndarray:
    text = spelling.sound(text)
    parts = spelling.split_at(self.markers, text) if has_markers else [text]
    ids = (
      [self.markers[part]]
      if has_markers and part in self.markers
      else self._processor.encode(part)
      for part in parts
    )
    return np.asarray([i for part in ids for i in part], np.int32)

  def decode(self, ids: Ids) -> str:
    silent = {self.boundary_id, self.begin_id, *self.stop_ids}
    return self._processor.decode(
      [i for i in _as_list(ids) if i not in silent and i < self.vocab_size]
    )

  def decode_bytes(self, ids: Ids) -> bytes:
    # Unlike `decode`, it keeps the space that some models put first: what
    # stands for a token must not hang on what comes before it.
    return b''.join(self._bytes_of(i) for i in _as_list(ids))

  @functools.cached_property
  def markers(self) -> Mapping[str, int]:
    is_control = self._processor.is_control
    return {
      self._processor.id_to_piece(i): i
      for i in range(self._processor.vocab_size())
      if is_control(i)
    }

  def _bytes_of(self, i: int) -> bytes:
    if i >= self.vocab_size or self._processor.is_control(i):
      return b''
    return spelling.piece_bytes(self._processor.id_to_piece(i))

  def unknown(self, text: str) -> list[str]:
    pieces = self._processor.encode_as_pieces(spelling.sound(text))
    to_id, unknown = self._processor.piece_to_id, self._processor.unk_id()
    return [x.strip('\u2581') for x in pieces if to_id(x) == unknown]

  def save(self, workdir: Workdir) -> None:
    _write(workdir, SENTENCEPIECE_NAME, self._model)


def make_tokenizer(
  config: DataConfig, corpus: Corpus, workdir: Workdir, vocab_size: int = 0
) -> Tokenizer:
  """The workdir's tokenizer; made as `config` says where there is none.

  Args:
    config: names the tokenizer.
    corpus: may be what it is made of.
    workdir: keeps it.
    vocab_size: rows of the model's table; 0 for as many as it has tokens.

  Raises:
    UserError: the tokenizer that `config` names cannot be read, or has tokens
      without a row.
  """
  if workdir_lib.has_tokenizer(workdir):
    return load_from_workdir(workdir)
  if config.tokenizer == 'bytes':
    tokenizer = ByteTokenizer()
  elif config.tokenizer == 'bpe':
    tokenizer = JsonTokenizer(
      byte_pairs.train(corpus, config.bpe_vocab_size, BOUNDARIES[0])
    )
  elif config.tokenizer == 'words':
    tokenizer = JsonTokenizer(words.train(corpus, BOUNDARIES[0]))
  else:
    tokenizer = read(epath.Path(expanded(config.tokenizer)))
  require_rows(vocab_size, tokenizer.vocab_size)
  tokenizer.save(workdir)
  return tokenizer


def require_rows(vocab_size: int, num_tokens: int) -> None:
  """Checks that a model of `vocab_size`, if that is set, knows all tokens.

  Raises:
    UserError: it does not.
  """
  if 0 < vocab_size < num_tokens:
    raise UserError(
      f"model.vocab_size must be at least the tokenizer's {num_tokens}, or 0 "
      f'to take it; got {vocab_size}.'
    )


def load_from_workdir(workdir: Workdir, vocab_size: int = 0) -> Tokenizer:
  """The tokenizer with which the workdir was trained.

  Args:
    workdir: of a training run or an import.
    vocab_size: rows of the model's table; 0 where it has one for each token.

  Raises:
    UserError: there is none, it cannot be read, or it has tokens without a row.
  """
  for name in workdir_lib.TOKENIZERS:
    if (path := epath.Path(workdir) / name).exists():
      found = read(path, Roles.read(workdir))
      if 0 < vocab_size < found.vocab_size:
        raise UserError(
          f'{str(path)!r} has {found.vocab_size:,} tokens, but the model knows '
          f'{vocab_size:,}: put the tokenizer there with which it was trained.'
        )
      return found
  raise UserError(
    f'workdir {str(workdir)!r} holds no tokenizer: give the --workdir of a '
    'training run.'
  )


def read(path: epath.PathLike, roles: Roles | None = None) -> Tokenizer:
  """The tokenizer in a file.

  Args:
    path: of a tokenizer.json, or of a SentencePiece model named *.model.
    roles: of its tokens, if it was published with them.

  Raises:
    UserError: it can't be read.
  """
  path = epath.Path(path)
  if not path.exists() or path.is_dir():
    raise UserError(
      f"data.tokenizer = {str(path)!r} is no file: give 'bytes', 'bpe', or the "
      'path of a tokenizer.json or of a SentencePiece model.'
    )
  try:
    content = path.read_bytes()
    if path.suffix == '.model':
      return SentencePieceTokenizer(content, roles)
    if json.loads(content).get('jaxsparse') == 'bytes':
      return ByteTokenizer()
    return JsonTokenizer(tokenizers.Tokenizer.from_buffer(content), roles)
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f'data.tokenizer = {str(path)!r} cannot be read '
      f'({str(error).splitlines()[0] if str(error) else type(error).__name__}):'
      ' give a tokenizer.json, or a SentencePiece model named *.model.'
    ) from error


def bytes_as_json() -> JsonTokenizer:
  """The `ByteTokenizer` as programs of others can have it."""
  return JsonTokenizer(byte_pairs.without_merges())


def _begins_with(tokenizer: tokenizers.Tokenizer) -> int | None:
  """The token that it puts before every text, if there is one."""
  ids = tokenizer.encode('').ids
  return ids[0] if ids else None


def _unique(*ids: int) -> tuple[int, ...]:
  return tuple(dict.fromkeys(ids))


def _sentencepiece() -> type:
  try:
    import sentencepiece
  except ImportError as error:
    raise UserError(
      'data.tokenizer names a SentencePiece model, which needs a package: '
      'pip install sentencepiece.'
    ) from error
  return sentencepiece.SentencePieceProcessor


def _as_list(ids: Ids) -> list[int]:
  return np.asarray(ids).tolist()


def _write(workdir: Workdir, name: str, content: bytes) -> None:
  directory = epath.Path(workdir)
  directory.mkdir(parents=True, exist_ok=True)
  # Every process of a run may write one.
  write_whole(directory / name, content)
