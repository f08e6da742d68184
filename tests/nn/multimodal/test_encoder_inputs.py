# SPDX-License-Identifier: Apache-2.0
"""What an encoder takes as it is, and what it refuses in a sentence."""

import functools

import jax
import jaxtyping
import numpy as np
import pytest

from jaxsparse.config.errors import UserError

from encoders import (  # isort: skip
  B, ENCODERS, FRAMES, IMAGES, NUM_PATCHES, P, SEEN, SEGMENTS, SIDE, T, TOKENS,
  WIDTH, params_of, run,
)  # fmt: skip

PATCHES = np.zeros((B, NUM_PATCHES, 3 * P * P), np.float32)
TEXT = np.zeros((B, T, 8), np.float32)
IMAGE = np.zeros((B, NUM_PATCHES, WIDTH), np.float32)


@pytest.fixture(autouse=True)
def untyped():
  """As a user calls it: annotations are of JAX's arrays alone."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_arrays_of_numpy():
  """Without a jit, parameters among them, and none is changed."""
  arguments = TOKENS, IMAGES, SEGMENTS, SEEN
  found = ENCODERS['late'].apply(params_of('late'), *arguments)
  np.testing.assert_allclose(found['fused'], run('late')['fused'], atol=1e-5)
  apply = functools.partial(
    ENCODERS['co_attention'].apply, params_of('co_attention')
  )
  want = run('co_attention')
  # What stands in padding is no matter, here either.
  text, image = want['text'].copy(), want['image'].copy()
  text[1, T - 2 :], image[1, -1:] = np.nan, np.nan
  given = text.copy(), image.copy()
  fused = apply(*given, SEGMENTS > 0, SEEN > 0, method='fuse')
  np.testing.assert_allclose(fused, want['fused'], atol=1e-5)
  np.testing.assert_array_equal(given[0], text)
  np.testing.assert_array_equal(given[1], image)
  with pytest.raises(UserError, match='tokens must be an array, got'):
    apply(TOKENS.tolist(), method='encode_text')


def refusal(name, *arguments, method=None):
  """What is said of a call."""
  module = ENCODERS[name]
  with pytest.raises(UserError) as error:
    jax.eval_shape(
      functools.partial(module.apply, method=method),
      params_of(name),
      *arguments,
    )
  return str(error.value)


@pytest.mark.parametrize(
  ('name', 'images'),
  [
    # Of another size, of another shape, without a batch, too many or too few.
    ('co_attention', IMAGES[:, :3, :3]),
    ('co_attention', IMAGES[:, :4, :4]),
    ('co_attention', IMAGES.reshape(B, SIDE // 2, SIDE * 2, 3)),
    ('co_attention', IMAGES[..., :1]),
    ('co_attention', IMAGES[0]),
    ('co_attention', IMAGES[0, 0]),
    ('co_attention', PATCHES),
    ('co_attention', FRAMES),
    ('frames', IMAGES),
    ('frames', FRAMES[:, :2]),
    ('frames', FRAMES[:, :3]),
    ('frames', np.concatenate([FRAMES, FRAMES], axis=1)),
  ],
)
def test_pictures_of_another_shape(name, images):
  kind = 'pictures [B, 6, 6, 3], as image_size = 6 and num_frames = 1 say'
  if name == 'frames':
    kind = 'videos of 4 frames [B, 4, 6, 6, 3], as image_size = 6 and num_fra'
  for method in ('encode_image', 'embed_image', None):
    tokens = () if method else (TOKENS,)
    said = refusal(name, *tokens, images, method=method)
    assert said.startswith(f'images must be {kind}')
    assert said.endswith(
      f'`at`, a row and a column of each; got {list(images.shape)}.'
    )


def test_patches_with_places():
  """Of pictures of any size, each with its place."""
  encode = functools.partial(refusal, 'co_attention', method='encode_image')
  at = np.zeros((B, NUM_PATCHES, 2), np.int32)
  assert 'at must be integers, got float32' in encode(PATCHES, None, at * 0.5)
  said = encode(PATCHES, None, at[..., :1])
  assert 'at must have the dimensions [2, 4, 2]' in said
  assert 'or patches [B, L, 27]' in encode(PATCHES[..., 1:], None, at)
  assert 'or patches [B, L, 27]' in encode(FRAMES, None, at)
  module = ENCODERS['co_attention']
  encode = functools.partial(module.apply, method='encode_image')
  for images in (PATCHES[:, :3], np.zeros((B, P, 3 * P, 3), np.float32)):
    found = jax.eval_shape(
      encode, params_of('co_attention'), images, None, at[:, :3]
    )
    assert found.shape == (B, 3, WIDTH)


def test_other_inputs_that_cannot_be():
  call = functools.partial(refusal, 'co_attention')
  said = call(TOKENS, IMAGES, SEGMENTS, SEEN[:, 1:])
  assert 'a mask must have the dimensions [2, 4]' in said
  said = call((IMAGES * 127).astype(np.uint8), method='encode_image')
  assert said == 'images must be of a floating-point type, got uint8.'
  both = 'text and image must be [B, T, 8] and [B, L, 12] of as many items'
  assert both in call(TOKENS, IMAGES[:1])
  assert both in call(TOKENS[:1], IMAGES)
  assert both in call(TOKENS[0], IMAGES)
  assert both in call(TEXT, IMAGE[:1], method='fuse')
  assert both in call(IMAGE, TEXT, method='fuse')
  assert both in call(TOKENS, IMAGE, method='fuse')
  said = refusal('frames', TEXT, IMAGE[:, 1:], method='fuse')
  assert 'the patches of num_frames = 4 frames, as many of each; got 3' in said


def test_what_is_no_config():
  module = ENCODERS['co_attention']
  for fields, sentence in (
    (
      dict(config=dict(fusion_type='late')),
      'config must be a MultiModalConfig',
    ),
    (dict(model=dict(model_dim=8)), 'model must be a ModelConfig, got'),
  ):
    init = module.clone(**fields).init
    with pytest.raises(UserError, match=sentence) as error:
      jax.eval_shape(init, jax.random.key(0), TOKENS, IMAGES)
    assert '\n' not in str(error.value)


def test_what_a_config_has_not():
  said = refusal('co_attention', IMAGE, method='image_inputs')
  assert said == "fusion_type must be 'prefix', got 'co_attention'."
  said = refusal('concat', IMAGE[:, 0], method='match_logit')
  assert said == 'match_logit needs matching_weight > 0, got 0.0.'
  for name in ('co_attention', 'late'):
    said = refusal(name, TOKENS, IMAGE, method='caption_logits')
    assert 'and a causal text; got' in said
