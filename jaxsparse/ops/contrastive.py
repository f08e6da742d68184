# SPDX-License-Identifier: Apache-2.0
"""Losses that bring pictures and their texts together.

SigLIP (arXiv:2303.15343) asks of every pair of the batch alone whether it
belongs together; InfoNCE (CLIP, arXiv:2103.00020) asks of every picture which
of all texts is its own, and of every text which picture. Embeddings a, b [B, E]
come normalised, and a temperature t = exp(log_temperature) of at most 100
scales their products:

  SigLIP   l = t a b^T + bias;  -1/B sum_ij log sigmoid(+l_ii, -l_ij)
  InfoNCE  l = t a b^T;         (CE(l, i) + CE(l^T, i)) / 2

Both take `item`, which says what a row is: rows of one item are right for each
other, so off the diagonal they are no negatives, and rows below 0 are padding
that counts for nothing.

Inside `jax.shard_map` each device has its own rows. SigLIP needs no sum over a
whole row, so texts go round the ring of devices; InfoNCE gathers them, which is
B E numbers, small beside the towers.

A row may have a wrong text of its own besides, hard to tell from the right one
(NegCLIP, arXiv:2210.01936): SigLIP asks one pair more of it, and InfoNCE has it
among the texts of its own picture alone, as nobody knows whether it is right
for another.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsparse import mesh
from jaxsparse.ops.shard_map_vma import match_vma

LARGEST_LOG_TEMPERATURE = math.log(100.0)

Axes = tuple[str, ...]
_MASKED = -1e30


@jax.custom_vjp
def clipped(log_temperature: Float[Array, '']) -> Float[Array, '']:
  """At most ln 100. Above that only a gradient that lowers it passes.

  That of `jnp.minimum` is 0 there: a temperature that one step has carried over
  the limit would never come back.
  """
  return jnp.minimum(log_temperature, LARGEST_LOG_TEMPERATURE)


def _clipped_forward(log_temperature):
  return clipped(log_temperature), log_temperature


def _clipped_backward(log_temperature, cotangent):
  is_free = (log_temperature < LARGEST_LOG_TEMPERATURE) | (cotangent > 0)
  return (jnp.where(is_free, cotangent, 0),)


clipped.defvjp(_clipped_forward, _clipped_backward)


def temperature(log_temperature: Float[Array, '']) -> Float[Array, '']:
  """What products of embeddings are multiplied with, at most 100."""
  return jnp.exp(clipped(log_temperature))


def contrastive_loss(
  name: str,
  image: Float[Array, 'B E'],
  text: Float[Array, 'B E'],
  log_temperature: Float[Array, ''],
  bias: Float[Array, ''] | None = None,
  item: Int[Array, 'B'] | None = None,
  wrong: Float[Array, 'B'] | None = None,
) -> Float[Array, '']:
  """The loss of the whole batch, of whatever devices hold its rows.

  Args:
    name: 'siglip' or 'infonce'.
    image: normalised embeddings of pictures.
    text: those of their texts.
    log_temperature: learned.
    bias: learned, of SigLIP alone.
    item: what each row is, see above; None: every row is one of its own.
    wrong: products of pictures with wrong texts of their own, of `own_wrong`.
  """
  single, spread = _FORMS[name]
  scalars = (log_temperature,) + (() if bias is None else (bias,))
  # On a mesh of one device rows count as split, too.
  if mesh.axis_sizes() is None:
    return single(image, text, *scalars, item=item, wrong=wrong)
  if item is None:
    item = jnp.arange(image.shape[0], dtype=jnp.int32)
  rows, same = jax.P(mesh.TOKENS), jax.P()
  split = (image, text, item) + (() if wrong is None else (wrong,))

  def run(*args):
    image, text, item, *wrong = args[: len(split)]
    return spread(
      image,
      text,
      *args[len(split) :],
      axes=mesh.TOKENS,
      item=item,
      wrong=wrong[0] if wrong else None,
    )

  return jax.shard_map(
    run,
    in_specs=(*(rows for _ in split), *(same for _ in scalars)),
    out_specs=same,
  )(
    *(mesh.reshard(x, rows) for x in split),
    *(mesh.reshard(x, same) for x in scalars),
  )


def own_wrong(
  image: Float[Array, 'B E'],
  wrong: Float[Array, 'B E'],
  is_there: Bool[Array, 'B'],
) -> Float[Array, 'B']:
  """Products of pictures with wrong texts of their own, if they have one."""
  return jnp.where(is_there, (image * wrong).sum(-1), _MASKED)


def siglip_loss(
  image: Float[Array, 'B E'],
  text: Float[Array, 'B E'],
  log_temperature: Float[Array, ''],
  bias: Float[Array, ''],
  item: Int[Array, 'B'] | None = None,
  wrong: Float[Array, 'B'] | None = None,
) -> Float[Array, '']:
  """SigLIP's loss of a batch: summed over all pairs, for each picture."""
  item = _items(item, image)
  scale = temperature(log_temperature)
  total = _siglip_block(image, text, scale, bias, item, item, True)
  return (total + _siglip_wrong(wrong, scale, bias, item)) / _number(item)


def siglip_ring(
  image: Float[Array, 'b E'],
  text: Float[Array, 'b E'],
  log_temperature: Float[Array, ''],
  bias: Float[Array, ''],
  axes: Axes,
  item: Int[Array, 'b'],
  wrong: Float[Array, 'b'] | None = None,
) -> Float[Array, '']:
  """`siglip_loss` inside `jax.shard_map`, of the rows of all devices.

  Texts go to the next device, until each has seen all of them; only a device's
  own block has positives.

  Args:
    image: this device's rows.
    text: likewise.
    log_temperature: learned, the same on all devices.
    bias: likewise.
    axes: of the mesh, along which devices have rows of their own.
    item: what each row is, the same number for equal rows of other devices.
    wrong: as `contrastive_loss` takes it.
  """
  scale = temperature(log_temperature)
  size = jax.lax.axis_size(axes)
  ring = [(i, (i + 1) % size) for i in range(size)]
  # Logits are as many as a whole batch's on each device: made again in the
  # backward pass.
  block = jax.checkpoint(_siglip_block, static_argnums=6)

  def step(carry, _):
    total, text, its_item = carry
    text, its_item = jax.lax.ppermute((text, its_item), axes, ring)
    total += block(image, text, scale, bias, item, its_item, False)
    return (total, text, its_item), None

  own = block(image, text, scale, bias, item, item, True)
  carry = match_vma(own, text, item)
  (total, _, _), _ = jax.lax.scan(step, carry, length=size - 1)
  total += _siglip_wrong(wrong, scale, bias, item)
  return jax.lax.psum(total, axes) / _number(item, axes)


def _siglip_block(image, text, scale, bias, item, other, is_own):
  """Summed over the pairs of these pictures and those texts."""
  logits = scale * _products(image, text) + bias
  positive = jnp.eye(len(item), dtype=bool) & is_own
  counts = (item[:, None] >= 0) & (other >= 0)[None]
  counts &= positive | (item[:, None] != other[None])
  losses = jax.nn.softplus(jnp.where(positive, -logits, logits))
  return jnp.where(counts, losses, 0).sum()


def _siglip_wrong(wrong, scale, bias, item):
  """Summed over these pictures' own wrong texts."""
  if wrong is None:
    return 0.0
  losses = jax.nn.softplus(_scaled(wrong, scale) + bias)
  return jnp.where(item >= 0, losses, 0).sum()


def siglip_reference(image, text, log_temperature, bias, item=None, wrong=None):
  """Oracle of `siglip_loss`, pair by pair as the paper writes it.

  `wrong` has a text for each picture, or None where there is none.
  """
  item = _items(item, image)
  scale = jnp.minimum(jnp.exp(log_temperature), 100.0)
  total = 0.0
  for i, a in enumerate(image):
    for j, b in enumerate(text):
      sign = 1 if i == j else -1
      probability = 1 / (1 + jnp.exp(-sign * (scale * a @ b + bias)))
      is_left_out = (item[i] < 0) | (item[j] < 0)
      is_left_out |= (i != j) & (item[i] == item[j])
      total -= jnp.where(is_left_out, 0, jnp.log(probability))
    if wrong is not None and wrong[i] is not None and item[i] >= 0:
      logit = scale * a @ wrong[i] + bias
      total -= jnp.log(1 / (1 + jnp.exp(logit)))
  return total / (item >= 0).sum()


def infonce_loss(
  image: Float[Array, 'B E'],
  text: Float[Array, 'B E'],
  log_temperature: Float[Array, ''],
  item: Int[Array, 'B'] | None = None,
  wrong: Float[Array, 'B'] | None = None,
) -> Float[Array, '']:
  """CLIP's loss of a batch: ln B where nothing tells the rows apart."""
  item = _items(item, image)
  scale = temperature(log_temperature)
  place = jnp.arange(len(item))
  total = sum(
    _cross_entropy(scale * _products(a, b), place, item, item, own)
    for a, b, own in ((image, text, _scaled(wrong, scale)), (text, image, None))
  )
  return total / (2 * _number(item))


def infonce_gathered(
  image: Float[Array, 'b E'],
  text: Float[Array, 'b E'],
  log_temperature: Float[Array, ''],
  axes: Axes,
  item: Int[Array, 'b'],
  wrong: Float[Array, 'b'] | None = None,
) -> Float[Array, '']:
  """`infonce_loss` inside `jax.shard_map`; arguments as of `siglip_ring`.

  Gradients go back to the devices whose rows were gathered.
  """
  scale = temperature(log_temperature)
  gather = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True)
  items = gather(item)
  place = jax.lax.axis_index(axes) * len(item) + jnp.arange(len(item))
  total = sum(
    _cross_entropy(scale * _products(a, gather(b)), place, item, items, own)
    for a, b, own in ((image, text, _scaled(wrong, scale)), (text, image, None))
  )
  return jax.lax.psum(total, axes) / (2 * _number(item, axes))


def _cross_entropy(logits, place, item, others, wrong=None):
  """Summed over rows, of which each has its own at `place` among the others.

  And a wrong one besides, if there are any.
  """
  is_own = place[:, None] == jnp.arange(len(others))[None]
  counts = is_own | ((item[:, None] != others[None]) & (others >= 0)[None])
  own = jnp.where(is_own, logits, 0).sum(-1)
  logits = jnp.where(counts, logits, _MASKED)
  if wrong is not None:
    logits = jnp.concatenate([logits, wrong[:, None]], axis=1)
  losses = jax.nn.logsumexp(logits, axis=-1) - own
  return jnp.where(item >= 0, losses, 0).sum()


def infonce_reference(image, text, log_temperature, item=None, wrong=None):
  """Oracle of `infonce_loss`: one softmax after the other; `item` of NumPy.

  `wrong` as `siglip_reference` takes it.
  """
  item = np.arange(len(image)) if item is None else item
  scale = jnp.minimum(jnp.exp(log_temperature), 100.0)
  total = 0.0
  for a, b in ((image, text), (text, image)):
    for i, row in enumerate(a):
      if item[i] < 0:
        continue
      extra = 0.0
      if a is image and wrong is not None and wrong[i] is not None:
        extra = jnp.exp(scale * row @ wrong[i])
      others = [
        j
        for j in range(len(b))
        if j == i or (item[j] >= 0 and item[j] != item[i])
      ]
      weights = {j: jnp.exp(scale * row @ b[j]) for j in others}
      total += jnp.log(sum(weights.values()) + extra) - jnp.log(weights[i])
  return total / (2 * (item >= 0).sum())


def hard_negatives(
  similarity: Float[Array, 'B B'],
  item: Int[Array, 'B'] | None = None,
  key: Key[Array, ''] | None = None,
) -> tuple[Int[Array, 'B'], Int[Array, 'B'], Bool[Array, 'B']]:
  """What to ask a matching head about besides the pairs themselves.

  As ALBEF (arXiv:2107.07651) has it, wrong texts and pictures are drawn by how
  much they look like the right ones. They are of these rows alone: a head reads
  both streams together, which for all pairs of a batch would be B^2.

  Args:
    similarity: of pictures (rows) and texts, as a softmax takes it.
    item: what each row is; equal rows are no negatives of each other.
    key: draws; None takes the most similar one.

  Returns:
    A wrong text for each picture, a wrong picture for each text, as indices of
    rows, and whether there is one: not where all others are equal or padding.
  """
  item = _items(item, similarity)
  is_wrong = (item[:, None] != item[None]) & (item >= 0)[None]
  is_wrong &= (item >= 0)[:, None]
  keys = (None, None) if key is None else jax.random.split(key)

  def pick(scores, key):
    scores = jnp.where(is_wrong, jax.lax.stop_gradient(scores), _MASKED)
    if key is not None:
      scores += jax.random.gumbel(key, scores.shape, scores.dtype)
    return scores.argmax(-1)

  texts, images = map(pick, (similarity, similarity.T), keys)
  return texts, images, is_wrong.any(-1)


def matching_loss(
  logits: Float[Array, ' n'],
  is_match: Bool[Array, ' n'],
  weight: Float[Array, ' n'] | None = None,
) -> Float[Array, '']:
  """Binary cross-entropy of "these belong together", in nats: ln 2 at zeros.

  Args:
    logits: of a head that reads picture and text together.
    is_match: whether they do.
    weight: of each; 0 where there was no negative to ask about.
  """
  logits = logits.astype(jnp.float32)
  losses = jax.nn.softplus(jnp.where(is_match, -logits, logits))
  if weight is None:
    return losses.mean()
  return (weight * losses).sum() / jnp.maximum(weight.sum(), 1e-9)


def _products(a, b):
  return jnp.einsum('ie,je->ij', a, b, preferred_element_type=jnp.float32)


def _scaled(wrong, scale):
  return None if wrong is None else scale * wrong


def _items(item, rows):
  return jnp.arange(len(rows), dtype=jnp.int32) if item is None else item


def _number(item, axes: Axes = ()):
  """Rows that are no padding; at least one, so that none give 0."""
  number = (item >= 0).sum().astype(jnp.float32)
  return jnp.maximum(jax.lax.psum(number, axes) if axes else number, 1)


_FORMS: dict[str, tuple[Callable, Callable]] = dict(
  siglip=(siglip_loss, siglip_ring),
  infonce=(infonce_loss, infonce_gathered),
)
