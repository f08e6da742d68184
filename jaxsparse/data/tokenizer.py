# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: bytes, byte-pair encoding, SentencePiece.

Every tokenizer has one boundary token. It stands before a document's first
token and is the target behind its last one; no text encodes to it, and it
decodes to nothing.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from etils import epath

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.pieces import Corpus
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.workdir import expanded, write_whole

JSON_NAME, SENTENCEPIECE_NAME = workdir_lib.TOKENIZERS

# What a document ends with in vocabularies of others; the first one is ours.
_BOUNDARIES = ('<|endoftext|>', '</s>', '<|end_of_text|>', '<eos>', '<|eos|>')

# More text hardly changes the merges that byte-pair encoding learns.
_BPE_TRAINING_BYTES = 1 << 26

Ids = Iterable[Any]
Workdir = str | pathlib.PurePath


@runtime_checkable
class Tokenizer(Protocol):
  """What training, inference and analysis need to know of a tokenizer."""

  vocab_size: int
  boundary_id: int

  def encode(self, text: str) -> np.ndarray:
    """The text's tokens, int32[n], without boundaries."""

  def decode(self, ids: Ids) -> str:
    """The tokens' text, with U+FFFD where it is not UTF-8."""

  def decode_bytes(self, ids: Ids) -> bytes:
    """The tokens' bytes: of all tokens together, those of each in turn."""

  def save(self, workdir: Workdir) -> None:
    """Writes what `load_from_workdir` reads."""


class ByteTokenizer:
  """One token for each byte of UTF-8."""

  vocab_size = 257
  boundary_id = 256

  def encode(self, text: str) -> np.ndarray:
    # Surrogates stand for bytes that were no UTF-8 when Python read them.
    content = text.encode('utf-8', 'surrogateescape')
    return np.frombuffer(content, np.uint8).astype(np.int32)

  def decode(self, ids: Ids) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def decode_bytes(self, ids: Ids) -> bytes:
    return bytes(i for i in _as_list(ids) if i < 256)

  def save(self, workdir: Workdir) -> None:
    _write(workdir, JSON_NAME, json.dumps(dict(jaxsparse='bytes')).encode())


class JsonTokenizer:
  """A tokenizer.json, as the `tokenizers` library writes it."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    ids = (tokenizer.token_to_id(token) for token in _BOUNDARIES)
    boundary_id = next((i for i in ids if i is not None), None)
    if boundary_id is None:
      tokenizer.add_special_tokens([_BOUNDARIES[0]])
      boundary_id = tokenizer.token_to_id(_BOUNDARIES[0])
    # A text that spells a special token out must not become that token.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer = tokenizer
    self.boundary_id = boundary_id
    # Identifiers may have gaps.
    self.vocab_size = max(tokenizer.get_vocab().values()) + 1

  def encode(self, text: str) -> np.ndarray:
    text = text.encode('utf-8', 'replace').decode()
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def decode(self, ids: Ids) -> str:
    if 'ByteLevel' in self._decoder:
      return self.decode_bytes(ids).decode('utf-8', 'replace')
    # Other decoders join tokens by rules that look at their neighbours.
    ids = [i for i in _as_list(ids) if i != self.boundary_id]
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def decode_bytes(self, ids: Ids) -> bytes:
    return b''.join(self._byte_table.get(i, b'') for i in _as_list(ids))

  def save(self, workdir: Workdir) -> None:
    _write(workdir, JSON_NAME, self._tokenizer.to_str().encode())

  @functools.cached_property
  def _decoder(self) -> str:
    decoder = json.loads(self._tokenizer.to_str())['decoder']
    return json.dumps(decoder, ensure_ascii=False)

  @functools.cached_property
  def _byte_table(self) -> dict[int, bytes]:
    """Bytes of each token; the words of WordPiece come without spaces."""
    to_bytes = (
      _byte_level_bytes if 'ByteLevel' in self._decoder else _piece_bytes
    )
    vocab = self._tokenizer.get_vocab(with_added_tokens=False)
    table = {i: to_bytes(token) for token, i in vocab.items()}
    for i, token in self._tokenizer.get_added_tokens_decoder().items():
      table[i] = token.content.encode()
    return table | {self.boundary_id: b''}


class SentencePieceTokenizer:
  """A SentencePiece model; its end-of-sentence token is the boundary."""

  def __init__(self, model: bytes):
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
    self.boundary_id = processor.eos_id()

  def encode(self, text: str) -> np.ndarray:
    text = text.encode('utf-8', 'replace').decode()
    return np.asarray(self._processor.encode(text), np.int32)

  def decode(self, ids: Ids) -> str:
    return self._processor.decode(
      [
        i
        for i in _as_list(ids)
        if i != self.boundary_id and i < self.vocab_size
      ]
    )

  def decode_bytes(self, ids: Ids) -> bytes:
    # Unlike `decode`, it keeps the space that some models put first: what
    # stands for a token must not hang on what comes before it.
    return b''.join(self._bytes_of(i) for i in _as_list(ids))

  def _bytes_of(self, i: int) -> bytes:
    if i >= self.vocab_size or self._processor.is_control(i):
      return b''
    return _piece_bytes(self._processor.id_to_piece(i))

  def save(self, workdir: Workdir) -> None:
    _write(workdir, SENTENCEPIECE_NAME, self._model)


def make_tokenizer(
  config: DataConfig, corpus: Corpus, workdir: Workdir
) -> Tokenizer:
  """The workdir's tokenizer; made as `config` says where there is none.

  Raises:
    UserError: the tokenizer that `config` names cannot be read.
  """
  if any(
    (epath.Path(workdir) / name).exists() for name in workdir_lib.TOKENIZERS
  ):
    return load_from_workdir(workdir)
  if config.tokenizer == 'bytes':
    tokenizer = ByteTokenizer()
  elif config.tokenizer == 'bpe':
    tokenizer = _train_bpe(corpus, config.bpe_vocab_size)
  else:
    tokenizer = _read(epath.Path(expanded(config.tokenizer)))
  tokenizer.save(workdir)
  return tokenizer


def load_from_workdir(workdir: Workdir) -> Tokenizer:
  """The tokenizer with which the workdir was trained.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  for name in workdir_lib.TOKENIZERS:
    if (path := epath.Path(workdir) / name).exists():
      return _read(path)
  raise UserError(
    f'workdir {str(workdir)!r} holds no tokenizer: give the --workdir of a '
    'training run.'
  )


def _read(path: epath.Path) -> Tokenizer:
  if not path.exists() or path.is_dir():
    raise UserError(
      f"data.tokenizer = {str(path)!r} is no file: give 'bytes', 'bpe', or the "
      'path of a tokenizer.json or of a SentencePiece model.'
    )
  try:
    content = path.read_bytes()
    if path.suffix == '.model':
      return SentencePieceTokenizer(content)
    if json.loads(content).get('jaxsparse') == 'bytes':
      return ByteTokenizer()
    return JsonTokenizer(tokenizers.Tokenizer.from_buffer(content))
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f'data.tokenizer = {str(path)!r} cannot be read '
      f'({str(error).splitlines()[0] if str(error) else type(error).__name__}):'
      ' give a tokenizer.json, or a SentencePiece model named *.model.'
    ) from error


def _train_bpe(corpus: Corpus, vocab_size: int) -> JsonTokenizer:
  """Byte-level byte-pair encoding; the same corpus gives the same one."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[_BOUNDARIES[0]],
    initial_alphabet=list(_byte_alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_bpe_training_texts(corpus), trainer)
  return JsonTokenizer(tokenizer)


def _bpe_training_texts(corpus: Corpus) -> Iterator[str]:
  """Pieces of the training split in a fixed random order, up to a limit."""
  num_bytes = 0
  for i in np.random.default_rng(0).permutation(len(corpus.train)):
    text = corpus.train[i].text
    yield text.decode('utf-8', 'replace')
    num_bytes += len(text)
    if num_bytes >= _BPE_TRAINING_BYTES:
      return


@functools.cache
def _byte_alphabet() -> dict[str, bytes]:
  """The character by which GPT-2's byte-level vocabularies write each byte.

  Printable bytes of Latin-1 stand for themselves; the others take the
  characters from U+0100 on, in their order.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): bytes([byte]) for byte in printable}
  return alphabet | {
    chr(256 + i): bytes([byte]) for i, byte in enumerate(others)
  }


def _byte_level_bytes(token: str) -> bytes:
  alphabet = _byte_alphabet()
  return b''.join(alphabet.get(char) or char.encode() for char in token)


def _piece_bytes(piece: str) -> bytes:
  """Bytes of a SentencePiece piece, of which some stand for one byte."""
  if byte := re.fullmatch('<0x([0-9A-F]{2})>', piece):
    return bytes([int(byte[1], 16)])
  return piece.replace('\u2581', ' ').encode()


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
