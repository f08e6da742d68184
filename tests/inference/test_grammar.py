# SPDX-License-Identifier: Apache-2.0
"""Texts of grammars: every one that the masks allow matches."""

import builtins
import json
import re

import numpy as np
import pytest
import tokenizers

from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer, JsonTokenizer
from jaxsparse.inference.grammar import Grammar, Guides, check

SCHEMA = json.dumps(
  dict(
    type='object',
    properties=dict(name=dict(enum=['a', 'b']), size=dict(type='integer')),
    required=['name', 'size'],
    additionalProperties=False,
  )
)
EXPRESSION = '(ab|c){2,4}-[0-9]{3}'


def allowed(guide):
  bits = np.unpackbits(guide.mask.view(np.uint8), bitorder='little')
  return np.flatnonzero(bits).tolist()


def write(tokenizer, grammar, seed, most=200):
  """A text of tokens at random; None if it does not come to its end."""
  guide = Guides(tokenizer, tokenizer.vocab_size).start(grammar)
  rng, tokens = np.random.default_rng(seed), []
  while not guide.is_over and len(tokens) < most:
    token = int(rng.choice(allowed(guide)))
    if token == tokenizer.boundary_id:
      break
    tokens.append(token)
    guide.advance(token)
  return None if len(tokens) == most else tokenizer.decode(tokens)


def words():
  """A tokenizer of spaced words, as SentencePiece has them."""
  letters = [*'abc-0123456789{}[]":, nmesiz', '▁', '▁{', '▁"name"', '":', '▁12']
  inner = tokenizers.Tokenizer(
    tokenizers.models.Unigram([('<s>', 0.0), *((x, -1.0) for x in letters)], 0)
  )
  inner.decoder = tokenizers.decoders.Metaspace()
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  inner.add_special_tokens(['<s>'])
  return JsonTokenizer(inner)


@pytest.mark.parametrize('make', [ByteTokenizer, words])
def test_texts_match_their_grammar(make):
  tokenizer, num_whole = make(), 0
  for seed in range(10):
    text = write(tokenizer, Grammar('regex', EXPRESSION), seed)
    assert re.fullmatch(EXPRESSION, text)
    # White space may have no end.
    text = write(tokenizer, Grammar('json_schema', SCHEMA), seed)
    if text is not None:
      num_whole += 1
      content = json.loads(text)
      assert content['name'] in 'ab'
      assert isinstance(content['size'], int)
      assert len(content) == 2
  assert num_whole


def test_any_object():
  guide = Guides(ByteTokenizer(), 257).start(Grammar('json_object'))
  assert ord('{') in allowed(guide)
  assert not {ord('['), ord('1'), 256} & set(allowed(guide))


def test_words_that_spell_the_end_do_not_end_a_text():
  guide = Guides(ByteTokenizer(), 257).start(Grammar('regex', '<end>x'))
  assert allowed(guide) == [ord('<')]


@pytest.mark.parametrize('vocab_size', [257, 300])
def test_a_mask_has_a_bit_for_each_token_of_the_model(vocab_size):
  guide = Guides(ByteTokenizer(), vocab_size).start(Grammar('regex', '.+'))
  assert guide.mask.dtype == np.uint32
  assert guide.mask.shape == (-(-vocab_size // 32),)
  assert max(allowed(guide)) < 257


@pytest.mark.parametrize(
  ('grammar', 'message'),
  [
    (Grammar('regex', 'a{'), 'regex must be a grammar, but: .*unclosed'),
    (Grammar('json_schema', '{"type": "foo"}'), 'but: Invalid type: foo'),
    (Grammar('json_schema', '[1'), "must be a JSON schema, got '\\[1'"),
    (Grammar('json_schema', '3'), "got '3': it is no object"),
    (Grammar('json_schema', '[' * 10**5), 'must be a JSON schema'),
  ],
)
def test_what_is_no_grammar_is_refused(grammar, message):
  with pytest.raises(UserError, match=message) as info:
    check(grammar)
  assert '\n' not in str(info.value)


@pytest.mark.parametrize('kind', ['json_object', 'json_schema', 'regex'])
def test_grammars_are_no_error(kind):
  check(Grammar(kind, dict(json_schema=SCHEMA, regex='a+').get(kind, '')))


def test_a_token_that_was_not_allowed():
  guide = Guides(ByteTokenizer(), 257).start(Grammar('regex', 'ab'))
  with pytest.raises(ValueError, match='satisfy the grammar'):
    guide.advance(ord('x'))


def test_tokens_that_can_not_spell_it():
  model = tokenizers.models.WordLevel({'\u2581cat': 0, '<unk>': 1}, '<unk>')
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tokenizer.decoder = tokenizers.decoders.Metaspace()
  guides = Guides(JsonTokenizer(tokenizer), 3)
  with pytest.raises(ValueError, match="none of this model's tokens can come"):
    guides.start(Grammar('json_object'))


def test_without_llguidance_a_sentence_says_what_to_install(monkeypatch):
  real = builtins.__import__

  def without(name, *args):
    if name == 'llguidance':
      raise ImportError(name)
    return real(name, *args)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match=r"pip install 'jaxsparse\[grammar\]'"):
    check(Grammar('json_object'))
