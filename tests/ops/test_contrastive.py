# SPDX-License-Identifier: Apache-2.0
"""Golden losses, oracles, and the batch of eight devices as that of one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh as mesh_lib
from jaxsparse.ops import contrastive

RNG = np.random.default_rng(0)
B, E = 16, 12
LN_10 = jnp.float32(math.log(10))
# Two rows of one item on different devices, two next to each other, and one of
# padding.
ITEMS = jnp.array([0, 1, 2, 2, 4, 5, 6, 7, 0, 9, 10, 11, 12, -1, 14, 15])


def unit(*shape):
  x = RNG.normal(size=shape).astype(np.float32)
  return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def test_siglip_of_zeros():
  zeros = jnp.zeros((2, 3))
  loss = contrastive.siglip_loss(zeros, zeros, LN_10, jnp.float32(-10))
  np.testing.assert_allclose(loss, 10.0000908, rtol=1e-7)


def test_siglip_of_orthogonal_pairs():
  eye = jnp.eye(2)
  loss = contrastive.siglip_loss(eye, eye, LN_10, jnp.float32(-10))
  np.testing.assert_allclose(loss, 0.6931926, atol=1e-7)


@pytest.mark.parametrize('size', [1, 7])
def test_infonce_of_zeros_is_the_log_of_the_batch(size):
  zeros = jnp.zeros((size, 3))
  loss = contrastive.infonce_loss(zeros, zeros, LN_10)
  np.testing.assert_allclose(loss, math.log(size), atol=1e-6)


def test_matching_of_zeros():
  loss = contrastive.matching_loss(jnp.zeros(3), jnp.array([True, False, True]))
  np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
  logits = jnp.array([9.0, -9.0, 50.0])
  weight = jnp.array([1.0, 1.0, 0.0])
  sure = contrastive.matching_loss(
    logits, jnp.array([True, False, False]), weight
  )
  np.testing.assert_allclose(sure, math.log1p(math.exp(-9)), rtol=1e-4)


SCALARS = dict(
  siglip=(jnp.float32(1.5), jnp.float32(-2)), infonce=(jnp.float32(1.5),)
)
ORACLES = dict(
  siglip=contrastive.siglip_reference, infonce=contrastive.infonce_reference
)


@pytest.fixture(scope='module')
def rows():
  return unit(B, E), unit(B, E)


def _single(name, item, is_there=None):
  """The loss; with `is_there` a wrong text of each is its own, backwards."""

  def loss(image, text, *scalars):
    wrong = None
    if is_there is not None:
      wrong = contrastive.own_wrong(image, text[:, ::-1], is_there)
    return contrastive.contrastive_loss(
      name, image, text, *scalars, item=item, wrong=wrong
    )

  return loss


@pytest.mark.parametrize('name', SCALARS)
def test_values_and_gradients_are_the_oracles(name, rows):
  """With and without items."""
  args = *(x[:4] for x in rows), *SCALARS[name]
  every = tuple(range(len(args)))
  oracle = ORACLES[name]

  @jax.jit
  def both(*args):
    return [
      [
        jax.value_and_grad(loss, every)(*args)
        for loss in (
          _single(name, None if item is None else jnp.array(item)),
          functools.partial(oracle, item=item),
        )
      ]
      for item in (None, np.array([0, 1, -1, 0]))
    ]

  for got, expected in both(*args):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      got,
      expected,
    )


@pytest.mark.parametrize('name', SCALARS)
def test_a_wrong_text_of_its_own_counts_as_the_oracle_has_it(name, rows):
  """Of rows 0 and 3, of which the last is padding."""
  image, text = (x[:4] for x in rows)
  item, is_there = np.array([0, 1, 2, -1]), np.array([True, False, False, True])

  @jax.jit
  def both(image, text, others, *scalars):
    def loss(image, text, others):
      wrong = contrastive.own_wrong(image, others, jnp.array(is_there))
      return contrastive.contrastive_loss(
        name, image, text, *scalars, item=jnp.array(item), wrong=wrong
      )

    def oracle(image, text, others):
      wrong = [
        x if there else None for x, there in zip(others, is_there, strict=True)
      ]
      return ORACLES[name](image, text, *scalars, item=item, wrong=wrong)

    return [
      jax.value_and_grad(f, (0, 1, 2))(image, text, others)
      for f in (loss, oracle)
    ]

  got, expected = both(image, text, rows[1][4:8], *SCALARS[name])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    got,
    expected,
  )
  slopes = np.abs(got[1][2]).max(-1)
  assert slopes[0] > 1e-3
  assert not slopes[1:].any()


@pytest.mark.parametrize('axes', [(4, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize('name', SCALARS)
def test_eight_devices_have_the_loss_of_one(name, axes, rows):
  """Values and all gradients, over both axes that split a batch."""
  scalars = SCALARS[name]
  every = tuple(range(2 + len(scalars)))
  loss = _single(name, ITEMS, jnp.arange(B) % 3 > 0)
  expected = jax.jit(jax.value_and_grad(loss, every))(*rows, *scalars)
  devices = jax.devices()[: math.prod(axes)]
  with jax.set_mesh(mesh_lib.make_mesh(*axes, devices=devices)):
    spec = jax.P(mesh_lib.TOKENS)
    args = [jax.device_put(x, spec) for x in rows]
    args += [jax.device_put(x, jax.P()) for x in scalars]
    got = jax.jit(jax.value_and_grad(loss, every))(*args)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    jax.device_get(got),
    jax.device_get(expected),
  )


@pytest.mark.parametrize('name', SCALARS)
def test_padding_and_equal_rows_are_no_negatives(name, rows):
  """The loss of a batch with padding is that of the batch without it."""
  image, text = (jnp.concatenate([x[:4], x[:2]]) for x in rows)
  loss = jax.jit(contrastive.contrastive_loss, static_argnums=0)
  padded = loss(
    name,
    image,
    text,
    *SCALARS[name],
    item=jnp.array([0, 1, 2, 3, -1, -1]),
  )
  alone = loss(name, image[:4], text[:4], *SCALARS[name])
  np.testing.assert_allclose(padded, alone, rtol=1e-6)
  nothing = loss(
    name, image[:2], text[:2], *SCALARS[name], item=jnp.full(2, -1)
  )
  assert nothing == 0
  equal = loss(
    name, image[:2], text[:2], *SCALARS[name], item=jnp.zeros(2, int)
  )
  each = [
    loss(name, image[i : i + 1], text[i : i + 1], *SCALARS[name])
    for i in (0, 1)
  ]
  np.testing.assert_allclose(equal, np.mean(each), rtol=1e-6, atol=1e-7)


def test_a_temperature_above_100_comes_back():
  """Its value is 100; what would raise it on is 0, what lowers it passes."""
  value, slope = jax.value_and_grad(
    lambda x, sign: sign * contrastive.clipped(x)
  )(jnp.float32(6), jnp.float32(1))
  np.testing.assert_allclose(value, math.log(100), rtol=1e-6)
  assert slope == 1
  assert jax.grad(lambda x: -contrastive.clipped(x))(jnp.float32(6)) == 0
  assert jax.grad(lambda x: -contrastive.clipped(x))(jnp.float32(4)) == -1


def test_hard_negatives_are_the_most_similar_wrong_ones():
  similarity = jnp.array(
    [[9.0, 5, 1, 8], [2, 9, 7, 0], [3, 1, 9, 2], [0, 0, 0, 9]]
  )
  texts, images, there = contrastive.hard_negatives(similarity)
  assert texts.tolist() == [3, 2, 0, 0]
  assert images.tolist() == [2, 0, 1, 0]
  assert there.all()
  # Rows 0 and 3 are one item, row 1 is padding.
  item = jnp.array([0, -1, 2, 0])
  texts, images, there = contrastive.hard_negatives(similarity, item)
  assert there.tolist() == [True, False, True, True]
  assert (int(texts[0]), int(texts[2]), int(texts[3])) == (2, 0, 2)
  assert int(images[0]) == int(images[3]) == 2


def test_drawn_negatives_follow_the_similarity():
  similarity = jnp.log(jnp.array([[9.0, 3, 1], [1, 9, 1], [1, 1, 9]]))
  keys = jax.random.split(jax.random.key(0), 400)
  texts, _, _ = jax.jit(
    jax.vmap(lambda key: contrastive.hard_negatives(similarity, key=key))
  )(keys)
  assert not (texts == jnp.arange(3)[None]).any()
  np.testing.assert_allclose((texts[:, 0] == 1).mean(), 0.75, atol=0.07)
