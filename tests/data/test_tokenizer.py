# SPDX-License-Identifier: Apache-2.0
"""Round trips, boundaries and files of every kind of tokenizer."""

import io
import itertools
import pathlib

import numpy as np
import pytest
import tokenizers

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import tokenizer as tokenizer_lib
from jaxsparse.data.pieces import Corpus, Piece

TEXTS = (
  '',
  'def f(x):\n    return x  # naïve café\n',
  '\t\tŽluťoučký kůň 🙂🐎 日本語 \u0000 \u2028',
  ''.join(map(chr, range(1, 0x180))),
  '  two  spaces <|endoftext|> and </s> spelt out ',
)


def _corpus() -> Corpus:
  words = ('the', 'cat', 'sat', 'on', 'mats', 'under', 'windows', 'again 🙂\n')
  text = ' '.join(itertools.chain(*itertools.permutations(words, 3)))
  train = [Piece(text.encode(), True)] * 4
  return Corpus(
    key='key', directory=pathlib.Path(), train=train, validation=train,
    test=None, validation_bytes=1,
  )  # fmt: skip


def _given_json(path, *added: str) -> None:
  """A byte-level tokenizer.json, not ours: it adds tokens when it encodes."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = pre
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=pre.alphabet(), show_progress=False
  )
  tokenizer.train_from_iterator(['the cat sat'] * 5, trainer)
  tokenizer.add_special_tokens(['<s>', *added])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', tokenizer.token_to_id('<s>'))]
  )
  tokenizer.save(str(path))


def _sentencepiece_model(path, **fields) -> None:
  sentencepiece = pytest.importorskip('sentencepiece')
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the cat sat on the mat'] * 99), model_writer=model,
    normalization_rule_name='identity', remove_extra_whitespaces=False,
    add_dummy_prefix=False, hard_vocab_limit=False, minloglevel=2,
    model_type='bpe',
    **dict(dict(vocab_size=300, byte_fallback=True), **fields),
  )  # fmt: skip
  path.write_bytes(model.getvalue())


@pytest.fixture(params=['bytes', 'bpe', 'given.json', 'given.model'])
def made(request, tmp_path):
  """A tokenizer of each kind, and the workdir that holds it."""
  is_bpe = request.param == 'bpe'
  config = DataConfig(
    tokenizer=request.param, **dict(bpe_vocab_size=300) if is_bpe else {}
  )
  if request.param.startswith('given'):
    path = tmp_path / request.param
    make = _given_json if path.suffix == '.json' else _sentencepiece_model
    make(path)
    config.tokenizer = str(path)
  workdir = tmp_path / 'run'
  return tokenizer_lib.make_tokenizer(config, _corpus(), workdir), workdir


def test_text_comes_back(made):
  tokenizer, _ = made
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert tokenizer.boundary_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(list(ids)) == text.encode()


def test_bytes_of_tokens_come_one_by_one(made):
  tokenizer, _ = made
  text = ''.join(TEXTS)
  ids = tokenizer.encode(text)
  assert b''.join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


def test_bytes_know_every_word(made):
  assert made[0].unknown(TEXTS[1]) == []


def test_parts_that_are_unknown_are_named(tmp_path):
  models = tokenizers.models
  vocab = {'\u2581a': 0, '\u2581cat': 1, '<unk>': 2}
  scores = [('<unk>', 0.0), ('\u2581a', -1.0), ('\u2581cat', -1.0)]
  words = TEXTS[0], 'a cat', 'a dog 漢字 cat', 'Zebra'
  for model in (models.WordLevel(vocab, '<unk>'), models.Unigram(scores, 0)):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made = tokenizer_lib.JsonTokenizer(tokenizer)
    found = [made.unknown(text) for text in words]
    assert found == [[], [], ['dog', '漢字'], ['Zebra']]
  path = tmp_path / 'given.model'
  _sentencepiece_model(path, byte_fallback=False, vocab_size=60)
  made = tokenizer_lib.read(path)
  assert made.unknown('the cat') == []
  assert made.unknown('the 漢字 cat') == ['漢字']


def test_the_boundary_decodes_to_nothing(made):
  tokenizer, _ = made
  assert 0 <= tokenizer.boundary_id < tokenizer.vocab_size
  ids = [tokenizer.boundary_id, *tokenizer.encode('cat'), tokenizer.boundary_id]
  assert tokenizer.decode(ids) == 'cat'
  assert tokenizer.decode_bytes(ids) == b'cat'


def test_tokens_that_only_the_model_has_decode_to_nothing(made):
  tokenizer, _ = made
  ids = [*tokenizer.encode('cat'), tokenizer.vocab_size, 10**6]
  assert tokenizer.decode(ids) == 'cat'
  assert tokenizer.decode_bytes(ids) == b'cat'


def test_what_has_too_many_tokens_is_not_kept(tmp_path):
  with pytest.raises(UserError, match="the tokenizer's 257, or 0"):
    tokenizer_lib.make_tokenizer(DataConfig(), _corpus(), tmp_path, 256)
  assert not [*tmp_path.iterdir()]
  tokenizer_lib.make_tokenizer(DataConfig(), _corpus(), tmp_path, 257)


def test_the_workdir_keeps_it(made):
  tokenizer, workdir = made
  config = DataConfig(tokenizer='no longer there')
  again = tokenizer_lib.make_tokenizer(config, _corpus(), workdir)
  for other in (again, tokenizer_lib.load_from_workdir(workdir)):
    assert type(other) is type(tokenizer)
    assert other.boundary_id == tokenizer.boundary_id
    assert other.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(
      other.encode(TEXTS[1]), tokenizer.encode(TEXTS[1])
    )
  assert len(list(workdir.iterdir())) == 1


def test_it_is_one_of_the_protocol(made):
  assert isinstance(made[0], tokenizer_lib.Tokenizer)


def test_random_bytes_come_back():
  tokenizer = tokenizer_lib.ByteTokenizer()
  content = np.random.default_rng(0).bytes(4096)
  ids = tokenizer.encode(content.decode('utf-8', 'surrogateescape'))
  assert tokenizer.decode_bytes(ids) == content
  assert (tokenizer.vocab_size, tokenizer.boundary_id) == (257, 256)


def test_bpe_is_the_same_each_time_and_learns_merges(tmp_path):
  config = DataConfig(tokenizer='bpe', bpe_vocab_size=280)
  for name in ('a', 'b'):
    tokenizer = tokenizer_lib.make_tokenizer(config, _corpus(), tmp_path / name)
  files = [(tmp_path / name / 'tokenizer.json') for name in ('a', 'b')]
  assert files[0].read_bytes() == files[1].read_bytes()
  assert tokenizer.vocab_size == 280
  assert len(tokenizer.encode('the cat sat on the mats')) < 12


@pytest.mark.parametrize('token', ['</s>', '<|endoftext|>', '<eos>'])
def test_a_given_vocabulary_ends_documents_with_its_own_token(tmp_path, token):
  path = tmp_path / 'given.json'
  _given_json(path, token)
  num_tokens = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
  config = DataConfig(tokenizer=str(path))
  tokenizer = tokenizer_lib.make_tokenizer(config, _corpus(), tmp_path / 'run')
  assert tokenizer.vocab_size == num_tokens
  assert tokenizer.boundary_id == num_tokens - 1


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('none.json', None, 'is no file'),
    ('bad.json', b'{', 'cannot be read'),
    ('list.json', b'[]', 'cannot be read'),
    ('other.json', b'{"model": 3}', 'cannot be read'),
    ('bad.model', b'not a model', 'cannot be read'),
  ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, words):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  config = DataConfig(tokenizer=str(path))
  with pytest.raises(UserError, match=f'{name}.* {words}'):
    tokenizer_lib.make_tokenizer(config, _corpus(), tmp_path / 'run')


def test_a_given_vocabulary_of_words_and_bytes_streams_its_spaces(tmp_path):
  """As Llama's first tokenizer.json: a marker for spaces, bytes to fall to."""
  bytes_ = [f'<0x{byte:02X}>' for byte in range(256)]
  vocab = ['<unk>', *bytes_, '\u2581', 'c', 'a', 't', '\u2581c', 'at']
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(vocab)},
      merges=[('\u2581', 'c'), ('a', 't')],
      unk_token='<unk>',
      byte_fallback=True,
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Metaspace(),
      tokenizers.decoders.Fuse(),
    ]
  )
  path = tmp_path / 'given.json'
  tokenizer.save(str(path))
  config = DataConfig(tokenizer=str(path))
  made = tokenizer_lib.make_tokenizer(config, _corpus(), tmp_path / 'run')
  ids = made.encode('cat cat 🙂')
  assert made.decode(ids) == 'cat cat 🙂'
  streamed = b''.join(made.decode_bytes([i]) for i in ids)
  assert streamed.decode() == ' cat cat 🙂'


def test_a_model_without_an_end_is_refused(tmp_path):
  path = tmp_path / 'given.model'
  _sentencepiece_model(path, eos_id=-1)
  config = DataConfig(tokenizer=str(path))
  with pytest.raises(UserError, match='without an end-of-sentence'):
    tokenizer_lib.make_tokenizer(config, _corpus(), tmp_path / 'run')


def test_a_workdir_without_one_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no tokenizer'):
    tokenizer_lib.load_from_workdir(tmp_path)
