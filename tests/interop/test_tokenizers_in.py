# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of published models in a workdir, and ours in a folder."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers

from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import (
  ByteTokenizer,
  JsonTokenizer,
  load_from_workdir,
)
from jaxsparse.interop import tokenizers_in

PUBLISHED = pathlib.Path(__file__).parents[1] / 'fixtures/hf/tokenizer'
TEXT = 'the quick owl said café №7,  twice\n😀'


@pytest.fixture
def source(tmp_path):
  return shutil.copytree(PUBLISHED, tmp_path / 'source')


def test_a_published_tokenizer_encodes_as_it_did(source, tmp_path):
  told = tokenizers_in.copy_tokenizer(source, tmp_path / 'run', 320)
  assert "320 tokens: a document begins with '<|endoftext|>'" in told
  expected = json.loads((source / 'expected.json').read_text())
  tokenizer = load_from_workdir(tmp_path / 'run')
  ids = tokenizer.encode(expected['text'])
  assert ids.tolist() == expected['ids']
  assert tokenizer.decode(ids) == expected['text']
  assert tokenizer.vocab_size == expected['vocab_size']
  assert tokenizer.boundary_id == tokenizer.begin_id == 0


def test_a_table_may_have_more_rows(source, tmp_path):
  tokenizers_in.copy_tokenizer(source, tmp_path / 'run', 512)
  found = load_from_workdir(tmp_path / 'run')
  assert found.decode([*found.encode('owl'), 320, 511]) == 'owl'
  assert found.decode_bytes([511]) == b''


def test_a_table_of_fewer_rows_is_refused(source, tmp_path):
  with pytest.raises(UserError, match='320 tokens, but the model knows 319'):
    tokenizers_in.copy_tokenizer(source, tmp_path / 'run', 319)
  assert not (tmp_path / 'run').exists()


def test_a_folder_may_have_none(tmp_path):
  told = tokenizers_in.copy_tokenizer(tmp_path, tmp_path / 'run', 320)
  assert 'has no tokenizer: the model reads ids' in told
  told = tokenizers_in.write_tokenizer(tmp_path, tmp_path / 'out')
  assert 'has no tokenizer' in told


def test_roles_that_no_token_has_are_refused(source, tmp_path):
  config = source / 'tokenizer_config.json'
  config.write_text(json.dumps(dict(eos_token='<|im_end|>')))
  with pytest.raises(UserError, match='is no token of'):
    tokenizers_in.copy_tokenizer(source, tmp_path / 'run', 320)


def test_a_vocabulary_without_an_end_is_refused(source, tmp_path):
  (source / 'tokenizer_config.json').unlink()
  path = source / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|endoftext|>', '<|other|>'))
  with pytest.raises(UserError, match='no token that ends a document: name it'):
    tokenizers_in.copy_tokenizer(source, tmp_path / 'run', 512)


def test_it_leaves_as_it_came(source, tmp_path):
  (source / 'chat_template.jinja').write_text('{{ eos_token }}')
  (source / 'generation_config.json').write_text('{"eos_token_id": [0, 1]}')
  tokenizers_in.copy_tokenizer(source, tmp_path / 'run', 320)
  tokenizers_in.write_tokenizer(tmp_path / 'run', tmp_path / 'out')
  tokenizers_in.copy_tokenizer(tmp_path / 'out', tmp_path / 'b', 320)
  again = load_from_workdir(tmp_path / 'b')
  assert again.stop_ids == (0, 1)
  np.testing.assert_array_equal(
    again.encode(TEXT), load_from_workdir(source).encode(TEXT)
  )
  for name in (
    'tokenizer_config.json',
    'chat_template.jinja',
    'generation_config.json',
  ):
    assert (tmp_path / 'b' / name).read_bytes() == (source / name).read_bytes()


def test_bytes_leave_as_a_tokenizer_that_others_read(tmp_path):
  ByteTokenizer().save(tmp_path / 'run')
  tokenizers_in.write_tokenizer(tmp_path / 'run', tmp_path / 'out')
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'out/tokenizer.json'))
  ids = theirs.encode(TEXT).ids
  assert ids == ByteTokenizer().encode(TEXT).tolist()
  assert theirs.decode(ids) == TEXT
  tokenizers_in.copy_tokenizer(tmp_path / 'out', tmp_path / 'b', 257)
  again = load_from_workdir(tmp_path / 'b')
  assert isinstance(again, JsonTokenizer)
  assert again.boundary_id == again.begin_id == 256
  assert again.vocab_size == 257
