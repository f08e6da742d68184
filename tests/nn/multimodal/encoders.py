# SPDX-License-Identifier: Apache-2.0
"""Small encoders of each kind, compiled once for all tests of a process."""

import dataclasses
import functools

import jax
import numpy as np
from parameters import draw

from jaxsparse.config import MultiModalConfig, VisionConfig
from jaxsparse.config.multimodal import encoder_stream
from jaxsparse.nn.multimodal import MultiModalEncoder

B, T, SIDE, P, WIDTH, VOCABULARY = 2, 5, 6, 3, 12, 20
NUM_PATCHES = (SIDE // P) ** 2
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, VOCABULARY, size=(B, T), dtype=np.int32)
# The second row ends in padding.
SEGMENTS = np.array([[1] * T, [1] * (T - 2) + [0] * 2], np.int32)
IMAGES = RNG.uniform(-1, 1, (B, SIDE, SIDE, 3)).astype(np.float32)
FRAMES = RNG.uniform(-1, 1, (B, 4, SIDE, SIDE, 3)).astype(np.float32)
SEEN = np.array([[1] * NUM_PATCHES, [1] * (NUM_PATCHES - 1) + [0]], np.int32)


def stream(width, **fields):
  small = dict(num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8)
  return dataclasses.replace(encoder_stream(width, 1), **small | fields)


def encoder(fusion_type, is_causal=False, vision=None, model=None, **fields):
  layers = {}
  if fusion_type in ('co_attention', 'concat'):
    layers = dict(num_fusion_layers=1)
  settings = dict(image_size=SIDE, patch_size=P, stream=stream(WIDTH))
  return MultiModalEncoder(
    config=MultiModalConfig(
      vision=VisionConfig(**settings | (vision or {})),
      fusion_type=fusion_type,
      fused_dim=6,
      **layers | fields,
    ),
    model=stream(
      8, vocab_size=VOCABULARY, is_causal=is_causal, **(model or {})
    ),
  )


ENCODERS = dict(
  co_attention=encoder('co_attention', matching_weight=1.0),
  concat=encoder('concat', vision=dict(pooling='attention')),
  late=encoder('late', contrastive='infonce'),
  # What patches see of each other reaches the text in the second block.
  prefix=encoder(
    'prefix', is_causal=True, caption_weight=1.0, model=dict(num_layers=2)
  ),
  captions=encoder('co_attention', is_causal=True, caption_weight=2.0),
  frames=encoder('co_attention', num_frames=4, frames_read=2),
)


def images_of(name):
  return FRAMES if ENCODERS[name].settings.num_frames > 1 else IMAGES


@functools.cache
def params_of(name):
  return draw(ENCODERS[name].init, TOKENS, images_of(name))


@functools.cache
def compiled(name):
  return jax.jit(ENCODERS[name].apply)


def run(name, tokens=TOKENS, images=None, segments=SEGMENTS, seen=SEEN, **how):
  """All results, as NumPy has them."""
  images = images_of(name) if images is None else images
  if images.ndim == 5 and seen is SEEN:
    seen = np.ones((B, 4, NUM_PATCHES), np.int32)
  params = how.get('params', params_of(name))
  return jax.tree.map(
    np.asarray, compiled(name)(params, tokens, images, segments, seen)
  )
