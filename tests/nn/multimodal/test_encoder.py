# SPDX-License-Identifier: Apache-2.0
"""Text and pictures fused: what must change nothing, and what something."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from parameters import draw, place

from jaxsparse import mesh as mesh_lib

from encoders import (  # isort: skip
  B, ENCODERS, IMAGES, NUM_PATCHES, P, SEEN, SEGMENTS, T, TOKENS,
  VOCABULARY, compiled, encoder, images_of, params_of, run,
)  # fmt: skip

KINDS = tuple(ENCODERS)
PICTURES = tuple(name for name in KINDS if name != 'frames')


def assert_close(got, want, atol=1e-5):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=atol), got, want
  )


@pytest.mark.parametrize('name', PICTURES)
def test_padding_changes_nothing(name):
  """What stands in masked tokens and patches."""
  want = run(name)
  tokens = np.where(SEGMENTS > 0, TOKENS, 3)
  images = IMAGES.copy()
  images[1, P:, P:] = np.nan
  got = run(name, tokens, images)
  for key in ('text_embedding', 'image_embedding', 'fused'):
    np.testing.assert_allclose(got[key], want[key], atol=1e-6)
  real = SEGMENTS > 0
  np.testing.assert_allclose(got['text'][real], want['text'][real], atol=1e-6)
  if 'logits' in want:
    assert_close(got['logits'][real], want['logits'][real])
  # What is there changes something.
  tokens = (TOKENS + 1) % VOCABULARY
  assert np.abs(run(name, tokens)['fused'] - want['fused']).max() > 1e-3
  assert np.abs(run(name, images=-IMAGES)['fused'] - want['fused']).max() > 1e-3


@pytest.mark.parametrize('name', PICTURES)
def test_padding_may_stand_anywhere(name):
  want, at = run(name), [1, 3, 4]
  tokens, segments = TOKENS.copy(), SEGMENTS.copy()
  tokens[1, at], segments[1] = TOKENS[1, :3], 0
  segments[1, at] = 1
  got = run(name, tokens, segments=segments)
  for key in ('text_embedding', 'fused'):
    np.testing.assert_allclose(got[key], want[key], atol=1e-5)


@pytest.mark.parametrize('name', few(['co_attention', 'prefix'], PICTURES))
def test_nothing_that_is_there_gives_no_nan(name):
  want = run(name)
  seen = SEEN * np.array([[1], [0]], np.int32)
  got = run(name, seen=seen)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
  assert (got['image_embedding'][1] == 0).all()
  assert_close(got['fused'][0], want['fused'][0])
  none = run(name, segments=SEGMENTS * 0, seen=SEEN * 0)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(none))


@pytest.mark.parametrize('name', few(['late'], PICTURES))
def test_gradients_where_nothing_is_there(name):
  module = ENCODERS[name]

  @jax.jit
  def gradients(params, *arguments):
    def loss(params):
      found = module.apply(params, *arguments)
      return found['fused'].sum() + found['image_embedding'].sum()

    return jax.grad(loss)(params)

  images = IMAGES * np.float32(np.nan)
  found = gradients(params_of(name), TOKENS, images, SEGMENTS, SEEN * 0)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize('name', few(['frames'], KINDS))
def test_a_batch_of_one_is_the_same_item_in_a_batch(name):
  want, seen = run(name), SEEN[:1]
  if name == 'frames':
    seen = np.ones((1, 4, NUM_PATCHES), np.int32)
  one = run(name, TOKENS[:1], images_of(name)[:1], SEGMENTS[:1], seen)
  for key in one.keys() & {'fused', 'logits', 'shares', 'match'}:
    np.testing.assert_allclose(one[key][0], want[key][0], atol=1e-5)


def with_zeros(params, *names):
  """Parameters with zeros in all leaves of modules or leaves of such names."""

  def leaf(path, x):
    keys = {part.key for part in path}
    return np.zeros_like(x) if set(names) <= keys else x

  return jax.tree.map_with_path(leaf, params)


def test_without_what_is_read_the_streams_are_independent():
  params = params_of('co_attention')
  for reader in ('text_reads', 'image_reads'):
    for leaf in ('output', 'output_bias'):
      params = with_zeros(params, reader, leaf)
  states = functools.partial(_fused_states, ENCODERS['co_attention'])
  states = jax.jit(states)
  text, image = states(params, TOKENS, IMAGES)
  same, other = states(params, TOKENS, -IMAGES)
  np.testing.assert_array_equal(text, same)
  assert np.abs(image - other).max() > 1e-3
  other, same = states(params, (TOKENS + 1) % VOCABULARY, IMAGES)
  np.testing.assert_array_equal(image, same)
  assert np.abs(text - other).max() > 1e-3
  # With it each depends on the other.
  params = params_of('co_attention')
  want = states(params, TOKENS, IMAGES)
  other, _ = states(params, TOKENS, -IMAGES)
  assert np.abs(want[0] - other).max() > 1e-3
  _, other = states(params, (TOKENS + 1) % VOCABULARY, IMAGES)
  assert np.abs(want[1] - other).max() > 1e-3


def _fused_states(module, params, tokens, images):
  def of(module):
    text, image = module.encode_text(tokens), module.encode_image(images)
    at = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    ones = [jnp.ones(x.shape[:2], jnp.int32) for x in (text, image)]
    return module.fusion(text, image, at, *ones)[:2]

  return module.apply(params, method=of)


@pytest.mark.parametrize('name', few(['co_attention'], PICTURES[:4]))
def test_the_order_of_patches_is_of_no_matter_for_fusion(name):
  """States of patches in another order, which know their places."""
  module, found = ENCODERS[name], run(name)
  order = np.array([2, 0, 3, 1])
  text = TOKENS if name == 'prefix' else found['text']

  @jax.jit
  def fuse(params, *arguments):
    return module.apply(params, *arguments, method='fuse')

  def fused(order):
    image, seen = found['image'][:, order], SEEN[:, order]
    return np.asarray(fuse(params_of(name), text, image, SEGMENTS, seen))

  want, got = fused(np.arange(NUM_PATCHES)), fused(order)
  np.testing.assert_allclose(want, run(name)['fused'], atol=1e-5)
  if name == 'prefix':  # It has its own order, as all tokens have.
    assert np.abs(got - want).max() > 1e-4
  else:
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('name', few(['co_attention'], KINDS))
def test_methods_are_what_a_call_gives(name):
  module, want = ENCODERS[name], run(name)
  seen = SEEN if name != 'frames' else np.ones((B, 4), bool)

  @jax.jit
  def methods(params, tokens, images, segments, seen):
    call = functools.partial(module.apply, params)
    text = call(tokens, segments, method='encode_text')
    image = call(images, seen, method='encode_image')
    read = tokens if name == 'prefix' else text
    logits = {}
    if 'logits' in want:
      how = dict(method='caption_logits')
      logits = dict(logits=call(tokens, image, segments, seen, **how))
    return dict(
      text=text,
      image=image,
      fused=call(read, image, segments, seen, method='fuse'),
      text_embedding=call(tokens, segments, method='embed_text'),
      image_embedding=call(images, seen, method='embed_image'),
      **logits,
    )

  got = methods(params_of(name), TOKENS, images_of(name), SEGMENTS, seen)
  for key, value in got.items():
    np.testing.assert_allclose(value, want[key], atol=1e-5, err_msg=key)
  for key in ('text_embedding', 'image_embedding'):
    np.testing.assert_allclose(np.linalg.norm(got[key], axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'sizes'),
  few(
    [('co_attention', (2, 2, 2))],
    [(n, s) for n in KINDS for s in ((2, 2, 2), (4, 2, 1))],
  ),
)
def test_a_mesh_gives_the_same(name, sizes):
  def repeated(x):  # For the mesh's 4 or 8 pieces.
    return np.tile(x, (4, *[1] * (x.ndim - 1)))

  module = wide(name) if sizes[-1] > 1 else ENCODERS[name]
  arguments = TOKENS, images_of(name), SEGMENTS
  params = draw(module.init, *arguments)
  arguments = [repeated(x) for x in arguments]
  want = jax.jit(module.apply)(params, *arguments)
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):
    placed = [
      jax.device_put(x, mesh_lib.act('B' + '.' * (x.ndim - 1)))
      for x in arguments
    ]
    params = place(params, module.init, *placed)
    got = jax.jit(module.apply)(params, *placed)
    assert_close(jax.device_get(got), jax.device_get(want), 2e-5)


def wide(name):
  """With heads for two devices."""
  module = ENCODERS[name]
  config = module.config
  vision = config.vision
  heads = dict(num_kv_heads=2)
  stream = dataclasses.replace(vision.stream, **heads)
  return module.clone(
    model=dataclasses.replace(module.model, **heads),
    config=dataclasses.replace(
      config, vision=dataclasses.replace(vision, stream=stream)
    ),
  )


@pytest.mark.parametrize(
  ('name', 'kind'),
  few(
    [('co_attention', 'Explicit')],
    [(n, k) for n in KINDS for k in ('Auto', 'Explicit')],
  ),
)
def test_a_guests_mesh_gives_the_same(name, kind):
  kind = getattr(jax.sharding.AxisType, kind)
  module = ENCODERS[name].clone(axes=mesh_lib.Axes(batch=('dp',)))
  mesh = jax.make_mesh((2,), ('dp',), (kind,), devices=jax.devices()[:2])
  arguments = TOKENS, images_of(name), SEGMENTS
  want = compiled(name)(params_of(name), *arguments)
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, jax.P('dp')) for x in arguments]
    params = jax.device_put(params_of(name), jax.P())
    got = jax.jit(module.apply)(params, *placed)
    assert_close(jax.device_get(got), jax.device_get(want))


def test_bfloat16():
  narrow = dict(dtype='bfloat16')
  plain = ENCODERS['co_attention']
  vision = dataclasses.replace(plain.config.vision.stream, **narrow)
  module = encoder(
    'co_attention', vision=dict(stream=vision), model=narrow,
    matching_weight=1.0,
  )  # fmt: skip
  got = jax.jit(module.apply)(
    params_of('co_attention'), TOKENS, IMAGES, SEGMENTS, SEEN
  )
  assert got['text'].dtype == got['image'].dtype == jnp.bfloat16
  assert got['fused'].dtype == got['text_embedding'].dtype == jnp.float32
  want = run('co_attention')
  for key in ('text_embedding', 'image_embedding'):
    np.testing.assert_allclose(got[key], want[key], atol=0.05)
