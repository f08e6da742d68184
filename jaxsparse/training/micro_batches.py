# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation: a batch in parts, and what they give put together.

Sums over targets are the batch's, so the loss and its gradient are too, and so
is what is a mean over tokens, as a micro-batch's is weighed by its tokens. What
is least or most of a micro-batch becomes so of the batch. Other figures of a
layer are not linear in its tokens; of the batch they are the same mean of those
of its micro-batches:

  the experts' balance loss, a product of two means over tokens
  'usage_fraction', 'usage_kl', 'usage_max', of the reads
  'score_std'
  what sparse attention averages over tiles, a router's loss and the price of
  blocks among it: weighed by their tokens and not by their tiles
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse import mesh

# tokens, targets, positions, segment_ids, loss_weight: each [B, T].
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# By the last word of a metric's name, how that of the batch is found.
_EXTREMES = dict(least=jnp.minimum, most=jnp.maximum)


def over_micro_batches(
  function: Callable, batch: Batch, num_micro: int, key: jax.Array
) -> tuple:
  """What a function gives for all micro-batches together.

  Args:
    function: of a micro-batch, its share of the batch's tokens, and its key; it
      returns a tree to be summed, metrics, which are joined as they come from
      `weighed`, and a tree of arrays [B, ...], which become
      [B, num_micro, ...].
    batch: arrays [B, T], of which micro-batch i has every `num_micro`-th row
      from row i on.
    num_micro: how many.
    key: of the batch.
  """
  if num_micro == 1:
    return function(batch, jnp.float32(1), jax.random.fold_in(key, 0))
  micros = _split(batch, num_micro)
  tokens = jnp.sum(micros['segment_ids'] > 0, axis=(1, 2), dtype=jnp.float32)
  shares = tokens / jnp.maximum(jnp.sum(tokens), 1.0)
  xs = (micros, shares, jnp.arange(num_micro))
  first, rest = (
    jax.tree.map(lambda x, part=part: x[part], xs)
    for part in (0, slice(1, None))
  )

  def run(micro, share, index):
    return function(micro, share, jax.random.fold_in(key, index))

  def add(carry, xs):
    total, metrics = carry
    result, more, kept = run(*xs)
    total = jax.tree.map(jnp.add, total, result)
    joined = {
      name: _EXTREMES.get(_kind(name), jnp.add)(value, more[name])
      for name, value in metrics.items()
    }
    return (total, joined), kept

  *carry, kept = run(*first)
  carry, others = jax.lax.scan(add, tuple(carry), rest)
  kept = jax.tree.map(
    lambda x, xs: jnp.moveaxis(jnp.concatenate([x[None], xs]), 0, 1),
    kept,
    others,
  )
  return *carry, kept


def weighed(metrics: Metrics, share: jax.Array) -> Metrics:
  """A micro-batch's part of the layers' metrics of its batch."""
  return {
    name: value if _kind(name) in _EXTREMES else value * share
    for name, value in metrics.items()
  }


def _kind(name: str) -> str:
  return name.rpartition('_')[2]


def _split(batch: Batch, num_micro: int) -> Batch:
  """[B, T] to [num_micro, B / num_micro, T], every device keeping its rows."""

  def split(x: jax.Array) -> jax.Array:
    shape = (x.shape[0] // num_micro, num_micro, *x.shape[1:])
    spec = mesh.act('B..')
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=spec), 1, 0)

  return jax.tree.map(split, batch)
