# SPDX-License-Identifier: Apache-2.0
"""Small models that write about pictures, and a workdir of one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from parameters import draw

from jaxsparse import config as c
from jaxsparse.config import saved_config
from jaxsparse.data.pictures.augment import scaled
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.nn.multimodal import MultiModalEncoder
from jaxsparse.run import checkpoint

# A picture has nine patches, which no chunk of four ends at.
SIDE, V, LENGTH = 12, 257, 24
SMALL = dict(num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)


def config(fusion_type='prefix', **fields):
  # In a window of six a text forgets the beginning of its picture.
  model = c.ModelConfig(
    num_layers=2, model_dim=16, attention_pattern=('local', 'global'),
    window=6, vocab_size=V, **SMALL,
  )  # fmt: skip
  stream = c.ModelConfig(num_layers=1, model_dim=12, is_causal=False, **SMALL)
  fields = dict(caption_weight=1.0) | fields
  if not fields['caption_weight'] and fusion_type != 'prefix':
    model = dataclasses.replace(model, is_causal=False)
  return c.Config(
    model=model,
    multimodal=c.MultiModalConfig(
      vision=c.VisionConfig(stream=stream, image_size=SIDE, patch_size=4),
      fusion_type=fusion_type,
      fused_dim=8,
      **fields,
    ),
    data=c.DataConfig(
      pairs='generated:shapes', tokenizer='words', seq_len=LENGTH
    ),
    train=c.TrainConfig(sample_tokens=0),
  )


def module_of(config):
  return MultiModalEncoder(config=config.multimodal, model=config.model)


@functools.cache
def params_of(config):
  """Far from ties: the likeliest token is one by much."""
  tokens = np.ones((1, 2), np.int32)
  images = np.zeros((1, SIDE, SIDE, 3), np.float32)
  init = module_of(config).init
  return draw(init, tokens, images, deviation=0.5)['params']


def pictures(number):
  rng = np.random.default_rng(3)
  return rng.integers(0, 256, (number, SIDE, SIDE, 3), dtype=np.uint8)


@functools.cache
def _whole(config):
  """(tokens [1, LENGTH], picture, seen) -> logits of all places, each anew."""
  module = module_of(config)

  @jax.jit
  def logits(params, tokens, picture, seen):
    image = module.apply(params, picture, method='encode_image')
    seen = jnp.full(image.shape[:2], seen, jnp.int32)
    return module.apply(
      params, tokens, image, image_mask=seen, method='caption_logits'
    )[0]

  return functools.partial(logits, {'params': params_of(config)})


def caption(config, picture, given, number):
  """The likeliest tokens, each by a pass over a row of training.

  Of no picture those of a text that sees nothing.
  """
  seen = picture is not None
  picture = pictures(1)[0] if picture is None else picture
  text = list(given)
  for _ in range(number):
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(text)] = text
    logits = _whole(config)(tokens, scaled(picture)[None], seen)
    text.append(int(logits[len(text) - 1].argmax()))
  return text[len(given) :]


def write_config(folder, config):
  (folder / 'config.json').write_text(saved_config.to_json(config))
  ByteTokenizer().save(folder)


def save(folder, config):
  """A workdir with a checkpoint of step 3."""
  write_config(folder, config)
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  params = jax.tree.map(jnp.asarray, params_of(config))
  checkpoints.save(3, params, {'step': jnp.int32(3)}, {})
  checkpoints.close()
  return folder
