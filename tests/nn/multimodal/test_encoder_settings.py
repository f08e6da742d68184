# SPDX-License-Identifier: Apache-2.0
"""What an encoder may be made of, how large it is, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from encoders import (
  ENCODERS,
  IMAGES,
  NUM_PATCHES,
  TOKENS,
  B,
  P,
  T,
  encoder,
  params_of,
)
from lanes import few

from jaxsparse import MultiModalEncoder as Exported
from jaxsparse.analysis.multimodal_cost import (
  co_attention_flops,
  multimodal_parameters,
  vision_flops,
)
from jaxsparse.config import MemoryConfig, ModelConfig, MoEConfig
from jaxsparse.config.errors import UserError
from jaxsparse.nn.multimodal import MultiModalEncoder

KINDS = tuple(ENCODERS)


def test_bare_arguments():
  """The widths and the fusion alone say enough."""
  assert Exported is MultiModalEncoder
  module = MultiModalEncoder(
    text_dim=1024, image_dim=768, fusion_type='co_attention'
  )
  images = jax.ShapeDtypeStruct((B, 224, 224, 3), jnp.float32)
  found, _ = jax.eval_shape(
    module.init_with_output, jax.random.key(0), TOKENS, images
  )
  assert found['text'].shape == (B, T, 1024)
  assert found['image'].shape == (B, 196, 768)
  assert found['fused'].shape == (B, 512)


@pytest.mark.parametrize('fusion_type', few([], ['concat', 'prefix']))
def test_bare_arguments_of_every_kind(fusion_type):
  module = MultiModalEncoder(8, 12, fusion_type)
  images = jax.ShapeDtypeStruct((B, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS, images)
  assert 'fused_map' in shapes['params']


def test_memory_layers_and_experts_in_both_streams():
  memory = MemoryConfig(num_keys=4, key_dim=4, num_selected=2, value_dim=4)
  memory = dataclasses.replace(memory, placements=((0, 0),))
  moe = MoEConfig(num_experts=4, num_experts_per_token=2, expert_dim=4)
  mixers = dict(memory=memory, moe=moe, bias='qkv')
  plain = encoder('co_attention')
  vision = dataclasses.replace(plain.config.vision.stream, **mixers)
  module = encoder('co_attention', vision=dict(stream=vision), model=mixers)
  found, shapes = jax.eval_shape(
    module.init_with_output, jax.random.key(0), TOKENS, IMAGES
  )
  for tower in ('text', 'image'):
    block = shapes['params'][tower]['block_00']
    assert {'memory', 'moe'} <= block.keys()
  assert 'moe' not in str(shapes['params']['fusion'].keys())
  metrics = found['metrics'].keys()
  assert 'image/block_00/memory/usage_kl' in metrics
  assert 'text/block_00/memory/usage_kl' in metrics
  counted = multimodal_parameters(module.settings, module.text_model).total
  assert counted == sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize('name', KINDS)
def test_parameters_in_closed_form(name):
  module = ENCODERS[name]
  counted = multimodal_parameters(module.settings, module.text_model).total
  assert counted == sum(x.size for x in jax.tree.leaves(params_of(name)))


def test_flops_by_hand():
  module = ENCODERS['co_attention']
  vision = module.settings.vision
  per_patch = 12 * 2 * 2 * 4 + 12 * 2 * 1 * 4 + 2 * 12 * 8
  scores = 4 * NUM_PATCHES * 2 * 4
  want = NUM_PATCHES * (2 * per_patch + scores + 2 * 3 * P * P * 12)
  assert vision_flops(vision) == want

  def one(queries, keys, width, other):
    heads = 2 * 4
    cross = 4 * queries * width * heads + 4 * keys * other * 4
    cross += 4 * queries * keys * heads
    mlp = 2 * queries * 2 * width * 8
    own = 2 * queries * (2 * width * heads + 2 * width * 4)
    return cross + 2 * mlp + own + 4 * queries * queries * heads

  want = one(T, NUM_PATCHES, 8, 12) + one(NUM_PATCHES, T, 12, 8)
  assert co_attention_flops(module.settings, module.text_model, T) == want


@pytest.mark.parametrize(
  ('fields', 'sentence'),
  [
    (dict(fusion_type='early'), 'fusion_type must be one of co_attention'),
    (dict(fusion_type='prefix'), 'model.is_causal must be True for captions'),
    (
      dict(fusion_type='concat', is_causal=True),
      "must be False with fusion_type = 'concat'",
    ),
    (
      dict(fusion_type='late', caption_weight=1.0),
      'caption_weight is of a text that reads the picture',
    ),
    (dict(fusion_type='late', matching_weight=1.0), 'and fuses nothing'),
    (
      dict(fusion_type='late', contrastive_weight=0.0),
      'or nothing is learned; got 0, 0 and 0',
    ),
    (
      dict(fusion_type='late', num_fusion_layers=3),
      "num_fusion_layers = 3 does nothing with fusion_type = 'late'",
    ),
    (
      dict(fusion_type='late', num_frames=2, frames_read=3),
      'frames_read must be at most num_frames = 2, got 3',
    ),
    (
      dict(fusion_type='concat', num_frames=2),
      "frame_choice = 'routed' learns by what is read",
    ),
  ],
)  # fmt: skip
def test_settings_that_cannot_be(fields, sentence):
  with pytest.raises(UserError, match=sentence):
    jax.eval_shape(encoder(**fields).init, jax.random.key(0), TOKENS, IMAGES)


def test_a_model_without_a_vocabulary():
  module = MultiModalEncoder(model=ModelConfig(is_causal=False))
  with pytest.raises(UserError, match='vocab_size of the text must be set'):
    jax.eval_shape(module.init, jax.random.key(0), TOKENS, IMAGES)


@pytest.mark.parametrize(
  ('fields', 'sentence'),
  [
    (dict(fusion_type='late'), "'late' is not that of config, 'co_attention'"),
    (dict(text_dim=9), 'text_dim = 9 is not that of model, 8: leave it out'),
    (dict(image_dim=9), 'image_dim = 9 is not that of config, 12'),
  ],
)
def test_attributes_that_contradict_each_other(fields, sentence):
  module = ENCODERS['co_attention'].clone(**fields)
  with pytest.raises(UserError, match=sentence):
    jax.eval_shape(module.init, jax.random.key(0), TOKENS, IMAGES)
