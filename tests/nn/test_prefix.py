# SPDX-License-Identifier: Apache-2.0
"""The language model behind a prefix, and as an encoder.

A prefix is a picture's inputs and some text: all of it is seen by all of it,
and what follows is causal (section 3.2 of arXiv:1910.10683).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from parameters import draw

from jaxsparse.config import DCMHAConfig, ModelConfig
from jaxsparse.config.attention import SparseAttentionConfig
from jaxsparse.config.errors import UserError
from jaxsparse.nn.transformer import Transformer, init_cache

MODEL = ModelConfig(
  num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4,
  mlp_dim=16, vocab_size=20,
)  # fmt: skip
MODELS = dict(
  dense=MODEL,
  composed=dataclasses.replace(MODEL, dcmha=DCMHAConfig(), query_chunk=4),
  local=dataclasses.replace(
    MODEL, attention_pattern=('local', 'global'), window=4
  ),
)
B, T, PICTURE, PREFIX = 2, 10, 4, 6
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(20, size=(B, T), dtype=np.int32)
INPUTS = RNG.normal(size=(B, T, 16)).astype(np.float32)
IS_INPUT = np.arange(T)[None].repeat(B, 0) < PICTURE
SPANS = (np.arange(T, dtype=np.int32)[None].repeat(B, 0) < PREFIX).astype(
  np.int32
)
ROW = dict(tokens=TOKENS, inputs=INPUTS, is_input=IS_INPUT, span_ids=SPANS)


@functools.cache
def params_of(name):
  return draw(Transformer(MODELS[name]).init, TOKENS)


@functools.cache
def compiled(name):
  module = Transformer(MODELS[name])
  return jax.jit(lambda params, row: module.apply(params, **row)[0])


def logits(name='dense', **changes):
  return np.asarray(compiled(name)(params_of(name), ROW | changes))


def changed(array, at):
  other = array.copy()
  other[:, at] = other[:, at] + 1
  return other


def test_the_suffix_changes_nothing_before_it():
  want = logits()
  got = logits(tokens=changed(TOKENS, 8) % 20)
  np.testing.assert_array_equal(got[:, :8], want[:, :8])
  assert (got[:, 8:] != want[:, 8:]).any(-1).all()


def test_the_first_of_the_prefix_sees_its_last():
  want = logits()
  for changes in (
    dict(inputs=changed(INPUTS, PICTURE - 1)),
    dict(tokens=changed(TOKENS, PREFIX - 1) % 20),
  ):
    assert (logits(**changes) != want).any(-1).all()
  # Tokens behind the inputs, and inputs behind the tokens, are of no matter.
  same = dict(tokens=changed(TOKENS, 0) % 20, inputs=changed(INPUTS, PICTURE))
  np.testing.assert_array_equal(logits(**same), want)


@pytest.mark.parametrize('name', few(['local'], MODELS))
def test_decoding_behind_a_prefix(name):
  """Fed at once, then token by token: what a whole pass gives, everywhere."""
  module = Transformer(MODELS[name])

  @jax.jit
  def decode(params, row):
    cache = init_cache(MODELS[name], B, T)
    first = {n: x[:, : PREFIX + 1] for n, x in row.items()}
    y, cache, _ = module.apply(params, **first, cache=cache)
    rest = jnp.moveaxis(row['tokens'][:, PREFIX + 1 :], 1, 0)

    def step(carry, token):
      cache, at = carry
      positions = jnp.full((B, 1), at, jnp.int32)
      y, cache, _ = module.apply(params, token[:, None], positions, cache=cache)
      return (cache, at + 1), y[:, 0]

    _, ys = jax.lax.scan(step, (cache, PREFIX + 1), rest)
    return jnp.concatenate([y, jnp.moveaxis(ys, 0, 1)], axis=1)

  np.testing.assert_allclose(
    decode(params_of(name), ROW), logits(name), atol=2e-5
  )


def test_packed_neighbours_and_padding_change_nothing():
  """Each row's first 7 tokens, packed into one, with padding behind."""
  both = {n: np.concatenate([x[0, :7], x[1, :7], x[0, :2]])[None]
          for n, x in ROW.items()}  # fmt: skip
  segments = np.repeat([1, 2, 0], [7, 7, 2]).astype(np.int32)[None]
  positions = np.array([[*range(7), *range(7), 0, 1]], np.int32)
  both['span_ids'][:, 14:] = 0
  packed = logits(**both, segment_ids=segments, positions=positions)
  want = logits()[:, :7]
  np.testing.assert_allclose(packed[0, :7], want[0], atol=1e-5)
  np.testing.assert_allclose(packed[0, 7:14], want[1], atol=1e-5)


def test_an_encoder_sees_everything():
  module = Transformer(dataclasses.replace(MODEL, is_causal=False))
  run = jax.jit(lambda *arguments: module.apply(*arguments)[0])
  want, got = (
    np.asarray(run(params_of('dense'), tokens))
    for tokens in (TOKENS, changed(TOKENS, T - 1) % 20)
  )
  assert (got != want).any(-1).all()


def refused(sentence, **row):
  with pytest.raises(UserError, match=sentence):
    compiled('dense')(params_of('dense'), dict(tokens=TOKENS) | row)


def test_half_of_what_is_needed_is_refused():
  refused('inputs and is_input say together', inputs=INPUTS)


def test_where_it_makes_no_sense():
  sparse = dict(
    attention_pattern=('sparse',),
    sparse=SparseAttentionConfig(block=2, tile=2, max_blocks=2),
  )
  with pytest.raises(UserError, match="is_causal must be True with 'sparse'"):
    dataclasses.replace(MODEL, is_causal=False, **sparse)
  model = Transformer(dataclasses.replace(MODEL, **sparse))
  with pytest.raises(UserError, match='is of global and local blocks'):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS, span_ids=SPANS)
  encoder = dataclasses.replace(MODEL, is_causal=False)
  with pytest.raises(UserError, match='cache is of causal streams'):
    init_cache(encoder, 1, 4)
  with pytest.raises(UserError, match='reach is of causal attention'):
    jax.eval_shape(
      Transformer(encoder).init, jax.random.key(0), TOKENS, span_ids=SPANS
    )
