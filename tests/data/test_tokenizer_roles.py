# SPDX-License-Identifier: Apache-2.0
"""Which tokens begin and end texts of published models, and how they encode."""

import json

import pytest
import tokenizers

from jaxsparse.config.errors import UserError
from jaxsparse.data import packing, tokenizer_roles
from jaxsparse.data.pieces import Piece
from jaxsparse.data.tokenizer import SentencePieceTokenizer, load_from_workdir
from jaxsparse.data.tokenizer_roles import Roles
from jaxsparse.inference.text import encode_prompt


def published(folder, special, config=None, generation=None, adds=None):
  """A folder with a tokenizer of letters, then these special tokens."""
  letters = {char: i for i, char in enumerate('Ġabc<|>/s')}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(list(special))
  if adds:
    made.post_processor = tokenizers.processors.TemplateProcessing(
      single=f'{adds} $A', special_tokens=[(adds, made.token_to_id(adds))]
    )
  made.save(str(folder / 'tokenizer.json'))
  for name, content in (
    (tokenizer_roles.CONFIG, config),
    (tokenizer_roles.GENERATION, generation),
  ):
    if content is not None:
      (folder / name).write_text(json.dumps(content))
  return load_from_workdir(folder)


# Boundary, begin and stops, as ids of the special tokens.
FAMILIES = {
  'none given': (('<s>', '</s>'), None, None, '<s>', 1, 1, (1,)),
  'SmolLM2 and Qwen': (
    ('<|endoftext|>', '<|im_start|>', '<|im_end|>'),
    dict(bos_token='<|im_start|>', eos_token='<|im_end|>'),
    None, None, 0, 0, (2, 0),
  ),
  'Llama 2': (
    ('<unk>', '<s>', '</s>'),
    dict(bos_token={'content': '<s>'}, eos_token={'content': '</s>'},
         add_bos_token=True),
    dict(eos_token_id=11), None, 2, 1, (2,),
  ),
  'Llama 3': (
    ('<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', '<|eom_id|>'),
    dict(bos_token='<|begin_of_text|>', eos_token='<|eot_id|>'),
    dict(eos_token_id=[10, 12, 11]), '<|begin_of_text|>', 1, 0, (2, 1, 3),
  ),
  'told not to begin': (
    ('<s>', '</s>'),
    dict(bos_token='<s>', eos_token='</s>', add_bos_token=False),
    None, '<s>', 1, 1, (1,),
  ),
  'an end of its own': (
    ('<begin>', '<end>'), dict(bos_token='<begin>', eos_token='<end>'),
    None, None, 1, 1, (1,),
  ),
  'two known ends': (
    ('<|endoftext|>', '</s>'), dict(eos_token='</s>'), None, None, 1, 1, (1,),
  ),
}  # fmt: skip


@pytest.mark.parametrize('family', FAMILIES)
def test_roles_of_families(tmp_path, family):
  special, config, generation, adds, *wanted = FAMILIES[family]
  found = published(tmp_path, special, config, generation, adds)
  first = found.markers[special[0]]
  boundary, begin, stops = wanted
  assert found.boundary_id - first == boundary
  assert found.begin_id - first == begin
  assert tuple(i - first for i in found.stop_ids) == stops
  assert found.decode_bytes([begin + first, boundary + first]) == b''


def test_older_folders_have_roles_elsewhere(tmp_path):
  config = dict(bos_token='<s>', add_bos_token=True, eos_token=None)
  special = dict(bos_token='<unk>', eos_token={'content': '<end>'})
  (tmp_path / tokenizer_roles.SPECIAL).write_text(json.dumps(special))
  published(tmp_path, ('<unk>', '<s>', '<end>'), config)
  assert Roles.read(tmp_path) == Roles(eos='<end>', bos='<s>', adds_bos=True)


def test_markers_are_tokens_only_when_asked_for(tmp_path):
  found = published(tmp_path, ('<s>', '</s>'), {})
  plain = [4, 8, 6, 1, 4, 7, 8, 6]
  assert found.encode('<s>a</s>').tolist() == plain
  assert found.encode('<s>a</s>', has_markers=True).tolist() == [9, 1, 10]
  # One does not disturb the other.
  assert found.encode('<s>a</s>').tolist() == plain
  assert found.decode(plain) == '<s>a</s>'


def test_a_document_begins_and_ends_with_its_tokens(tmp_path):
  config = dict(bos_token='<s>', add_bos_token=True)
  found = published(tmp_path, ('<s>', '</s>'), config)
  assert encode_prompt(found, 'ab').tolist() == [9, 1, 2]
  whole = packing.shifted(Piece(b'ab', True), found)
  assert whole['tokens'].tolist() == [9, 1, 2]
  assert whole['targets'].tolist() == [1, 2, 10]
  part = packing.shifted(Piece(b'ab', False), found)
  assert part['tokens'].tolist() == [9, 1]


def test_sentencepiece_has_them_too(tmp_path):
  import io

  import sentencepiece

  content = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the cat'] * 9), model_writer=content,
    vocab_size=270, model_type='bpe', byte_fallback=True, minloglevel=2,
    hard_vocab_limit=False, add_dummy_prefix=False,
  )  # fmt: skip
  model = content.getvalue()
  alone = SentencePieceTokenizer(model)
  assert (alone.begin_id, alone.boundary_id, alone.stop_ids) == (2, 2, (2,))
  llama = SentencePieceTokenizer(model, Roles(eos='</s>', stop_ids=(7,)))
  assert (llama.begin_id, llama.boundary_id, llama.stop_ids) == (1, 2, (2, 7))
  assert SentencePieceTokenizer(model, Roles(adds_bos=False)).begin_id == 2
  assert llama.markers == {'<s>': 1, '</s>': 2}
  ids = llama.encode('<s>cat</s>', has_markers=True).tolist()
  assert ids == [1, *llama.encode('cat'), 2]
  assert not set(llama.encode('<s>cat</s>').tolist()) & {1, 2}


@pytest.mark.parametrize(
  ('given', 'taken'),
  [
    ('a', 'a'),
    ([{'name': 'tools', 'template': 'b'}], 'b'),
    (
      [1, {'name': ['x']}, {'name': 'default', 'template': 'c'}],
      'c',
    ),
    ([1], None),
    (7, None),
  ],
)
def test_the_template_of_chats(tmp_path, given, taken):
  content = json.dumps(dict(chat_template=given))
  (tmp_path / tokenizer_roles.CONFIG).write_text(content)
  assert tokenizer_roles.chat_template(tmp_path) == taken


@pytest.mark.parametrize('content', ['[]', '{', '3', '[' * 100_000])
def test_a_damaged_file_is_told(tmp_path, content):
  (tmp_path / tokenizer_roles.CONFIG).write_text(content)
  with pytest.raises(UserError, match=r"tokenizer_config\.json' can't be read"):
    Roles.read(tmp_path)


def test_the_digest_is_of_all_that_decides_its_tokens(tmp_path):
  published(tmp_path, ['</s>'], config={'eos_token': '</s>'})
  found = {tokenizer_roles.digest(tmp_path)}
  for name in (
    tokenizer_roles.CONFIG, tokenizer_roles.GENERATION, 'tokenizer.json'
  ):  # fmt: skip
    (tmp_path / name).write_text('{}')
    found.add(tokenizer_roles.digest(tmp_path))
  assert len(found) == 4
  (tmp_path / 'metrics.jsonl').write_text('{}')
  assert tokenizer_roles.digest(tmp_path) in found
