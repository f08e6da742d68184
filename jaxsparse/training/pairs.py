# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions as what is trained: parameters, losses and scores.

The loss is the sum of up to three by the weights of `MultiModalConfig`: of all
pairs of the batch (SigLIP or InfoNCE), of the caption's tokens with the picture
in sight, and of telling a pair from its hardest negatives.
"""

import functools

import jax
import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.config import Config, MultiModalConfig
from jaxsparse.nn.memory.tables import ENTRIES
from jaxsparse.nn.multimodal import MultiModalEncoder
from jaxsparse.ops import contrastive
from jaxsparse.training.losses import token_losses
from jaxsparse.training.micro_batches import Batch, Metrics


def encoder(config: Config) -> MultiModalEncoder:
  """The module that a run of pairs trains."""
  return MultiModalEncoder(config=config.multimodal, model=config.model)


def draw(config: Config) -> dict:
  """The first parameters, whatever the mesh in use."""
  assert config.multimodal is not None
  rows = mesh.num_token_shards()
  tokens = mesh.reshard(jnp.zeros((rows, 1), jnp.int32), mesh.act('BT'))
  images = jnp.zeros((rows, *config.multimodal.image_shape), jnp.float32)
  images = mesh.reshard(images, mesh.act('B' + '.' * (images.ndim - 1)))
  key = jax.random.key(config.train.seed)
  return encoder(config).init(key, tokens, images)['params']


def loss(
  config: Config,
  variables: dict,
  batch: Batch,
  total_weight: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, Metrics, dict]:
  """The loss of a batch of pairs, as `data.pictures.batches` makes them.

  Args:
    config: of the run.
    variables: parameters.
    batch: 'images', 'item', and the arrays of texts [B, T].
    total_weight: of the targets of the captions.
    key: of dropout, and of the negatives that are drawn.

  Returns:
    The loss, its parts beside what the layers report, and what these have read.
  """
  of_dropout, of_negatives = jax.random.split(key)
  settings = config.multimodal
  assert settings is not None
  found, sown = encoder(config).apply(
    variables,
    batch['tokens'],
    batch['images'],
    batch['segment_ids'],
    deterministic=config.model.dropout_rate == 0,
    asking=asking(settings, batch),
    rngs={'dropout': of_dropout},
    mutable=[ENTRIES],
  )
  if config.data.distractors:
    found |= _of_wrong(config, variables, batch)
  metrics, total = dict(found['metrics']), jnp.zeros((), jnp.float32)
  parts = dict(
    contrastive=lambda: _contrastive(config, found, batch),
    caption=lambda: _caption(found, batch).sum() / total_weight,
    matching=lambda: _matching(config, variables, found, batch, of_negatives),
  )
  for name, part in parts.items():
    if weight := getattr(settings, f'{name}_weight'):
      metrics[f'{name}_loss'] = part()
      total += weight * metrics[f'{name}_loss']
  if settings.contrastive_weight:
    metrics['temperature'] = contrastive.temperature(found['log_temperature'])
  return total, metrics, sown


def _of_wrong(config, variables, batch):
  """States and vectors of the distractors, and which rows have one."""
  tokens, segments = batch['wrong_tokens'], batch['wrong_segment_ids']
  apply = functools.partial(encoder(config).apply, variables)
  states = apply(tokens, segments, method='encode_text')
  is_prefix = config.multimodal.fusion_type == 'prefix'
  return dict(
    wrong_text=tokens if is_prefix else states,
    wrong_embedding=apply(states, segments, method='text_vector'),
    has_wrong=segments.any(-1),
  )


def _contrastive(config, found, batch):
  wrong = None
  if 'has_wrong' in found:
    wrong = contrastive.own_wrong(
      found['image_embedding'], found['wrong_embedding'], found['has_wrong']
    )
  return contrastive.contrastive_loss(
    config.multimodal.contrastive,
    found['image_embedding'],
    found['text_embedding'],
    found['log_temperature'],
    found.get('logit_bias'),
    batch['item'],
    wrong,
  )


def _caption(found, batch):
  """Nats of each caption's targets, summed, [B]."""
  losses = token_losses(found['logits'], batch['targets'])
  return jnp.sum(losses * batch['loss_weight'], axis=-1)


def _matching(config, variables, found, batch, key):
  """Of the pairs, and of a wrong text and a wrong picture for each."""
  is_prefix = config.multimodal.fusion_type == 'prefix'
  text = batch['tokens'] if is_prefix else found['text']
  image, segments, item = found['image'], batch['segment_ids'], batch['item']
  scale = contrastive.temperature(found['log_temperature'])

  def draw_wrong(image, text, segments, item, vectors, others, key, scale):
    # Of a device's own rows, whose states it has.
    similarity = scale * vectors @ others.T
    texts, images, is_there = contrastive.hard_negatives(similarity, item, key)
    return text[texts], segments[texts], image[images], is_there

  of_text, its_segments, of_image, is_there = mesh.over_tokens(
    draw_wrong, replicated=(6, 7)
  )(
    image,
    text,
    segments,
    item,
    jax.lax.stop_gradient(found['image_embedding']),
    jax.lax.stop_gradient(found['text_embedding']),
    key,
    jax.lax.stop_gradient(scale),
  )
  # A text that is known to be hard before one that the batch has by chance.
  has_text = is_there
  if 'has_wrong' in found:
    has_wrong = found['has_wrong']
    has_text |= has_wrong
    rows = has_wrong.reshape(-1, *(1 for _ in text.shape[1:]))
    of_text = jnp.where(rows, found['wrong_text'], of_text)
    its_segments = jnp.where(
      has_wrong[:, None], batch['wrong_segment_ids'], its_segments
    )
  apply = functools.partial(encoder(config).apply, variables)
  wrong = (
    apply(of_text, image, its_segments, method='fuse'),
    apply(text, of_image, segments, method='fuse'),
  )
  of_pairs = contrastive.matching_loss(
    found['match'], jnp.ones_like(item, bool), (item >= 0).astype(jnp.float32)
  )
  # Each kind apart, as a mesh lays its rows.
  of_wrong = [
    contrastive.matching_loss(
      apply(fused, method='match_logit'),
      jnp.zeros_like(item, bool),
      is_there.astype(jnp.float32),
    )
    for fused, is_there in zip(wrong, (has_text, is_there), strict=True)
  ]
  return (of_pairs + sum(of_wrong)) / 3


def embed_step(config: Config, params: dict, batch: Batch) -> dict:
  """Vectors of a batch of held-out pairs, and the nats of their captions.

  Returns:
    `image` and `text` [B, E] of length 1, on every device; with caption_weight
    `nats` and `targets`, with frames `frames_read` and `frames`, summed over
    the batch.
  """
  settings = config.multimodal
  assert settings is not None
  found = _applied(config, params, batch)
  result = {
    name: everywhere(found[f'{name}_embedding']) for name in ('image', 'text')
  }
  if settings.caption_weight:
    result['nats'] = _caption(found, batch).sum()
    result['targets'] = jnp.sum(batch['loss_weight'])
  if settings.num_frames > 1:
    number = jnp.sum(batch['item'] >= 0)
    share = found['metrics']['frames/share_read']
    result['frames'] = number * settings.num_frames
    result['frames_read'] = result['frames'] * share
  return result


def score_step(
  config: Config, params: dict, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """How well each text fits its picture [B], by the best that was trained.

  The log-likelihood of the caption; without such a loss temperature times the
  product of both vectors, plus the matching head's logit, of these what there
  is. And whether a row is a pair.
  """
  settings = config.multimodal
  assert settings is not None
  found = _applied(config, params, batch)
  if settings.caption_weight:
    scores = -_caption(found, batch)
  else:
    scores = found.get('match', 0.0)
    if settings.contrastive_weight:
      vectors = found['image_embedding'], found['text_embedding']
      scale = contrastive.temperature(found['log_temperature'])
      scores += scale * jnp.sum(vectors[0] * vectors[1], axis=-1)
  return everywhere(scores), everywhere(batch['item'] >= 0)


def _applied(config, params, batch):
  return encoder(config).apply(
    {'params': params},
    batch['tokens'],
    batch['images'],
    batch['segment_ids'],
    asking=asking(config.multimodal, batch),
  )


def asking(settings: MultiModalConfig, batch: Batch) -> jax.Array | None:
  """Tokens [B, T] that choose frames: of captions to be learned those before.

  None for all of them.
  """
  if settings.num_frames == 1 or not settings.caption_weight:
    return None
  weight = batch['loss_weight']
  learned_before = jnp.cumsum(weight, axis=1) - weight
  return (learned_before == 0) & (batch['segment_ids'] > 0)


def everywhere(x: jax.Array) -> jax.Array:
  """The whole array on every device, so that every process can read it."""
  return mesh.reshard(x, jax.P()) if mesh.act('B') else x
