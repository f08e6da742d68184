# SPDX-License-Identifier: Apache-2.0
"""Text that is written with a picture in sight, by a language model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import (
  ENCODERS,
  IMAGES,
  NUM_PATCHES,
  SEEN,
  SEGMENTS,
  TOKENS,
  VOCABULARY,
  B,
  P,
  T,
  params_of,
  run,
)

from jaxsparse.nn.transformer import Transformer, init_cache


@pytest.mark.parametrize('name', ['prefix', 'captions'])
def test_a_caption_is_causal_and_sees_the_picture(name):
  want = run(name)['logits']
  tokens = TOKENS.copy()
  tokens[:, 3] = (tokens[:, 3] + 1) % VOCABULARY
  got = run(name, tokens)['logits']
  np.testing.assert_allclose(got[:, :3], want[:, :3], atol=1e-5)
  assert (np.abs(got - want)[0, 3:] > 1e-5).any(-1).all()
  images = IMAGES.copy()
  images[0, P:, P:] += 1  # The last patch.
  got = run(name, images=images)['logits']
  assert (np.abs(got - want)[0] > 1e-5).any(-1).all()
  np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_the_language_model_continues_a_picture():
  """By its ordinary cache, with the parameters of the text tower."""
  module, params = ENCODERS['prefix'], params_of('prefix')
  model = Transformer(module.text_model)

  @jax.jit
  def decode(params, tokens, images):
    image = module.apply(params, images, method='encode_image')
    inputs = module.apply(params, image, method='image_inputs')
    of = functools.partial(model.apply, dict(params=params['params']['text']))
    width = NUM_PATCHES + 1
    first = jnp.pad(tokens[:, :1], ((0, 0), (NUM_PATCHES, 0)))
    is_input = jnp.arange(width)[None].repeat(B, 0) < NUM_PATCHES
    y, cache, _ = of(
      first,
      inputs=jnp.pad(inputs, ((0, 0), (0, 1), (0, 0))),
      is_input=is_input,
      span_ids=is_input.astype(jnp.int32),
      cache=init_cache(module.text_model, B, NUM_PATCHES + T),
    )
    at = jnp.full((B, 1), width, jnp.int32) + jnp.arange(T - 1)[None]
    rest, _, _ = of(tokens[:, 1:], at, cache=cache)
    return jnp.concatenate([y[:, -1:], rest], axis=1)

  got = np.asarray(decode(params, TOKENS, IMAGES))
  want = run('prefix', segments=SEGMENTS * 0 + 1, seen=SEEN * 0 + 1)['logits']
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize('name', ['captions'])
def test_a_language_models_parameters_are_a_text_towers(name):
  """Its states give that language model's logits."""
  module = ENCODERS[name]
  model = Transformer(module.text_model)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  of_text = dict(params=params_of(name)['params']['text'])
  assert jax.tree.structure(shapes) == jax.tree.structure(of_text)

  @jax.jit
  def both(params, tokens):
    logits, _, _ = model.apply(dict(params=params['params']['text']), tokens)
    states = module.apply(params, tokens, method='encode_text')
    return logits, states @ params['params']['text']['embed']['table'].T

  want, got = both(params_of(name), TOKENS)
  np.testing.assert_allclose(got, want, atol=1e-5)
