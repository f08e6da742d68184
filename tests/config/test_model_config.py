# SPDX-License-Identifier: Apache-2.0
"""Settings of the model that can't be: one sentence that says what can."""

import pytest

from jaxsparse.config import (
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  RopeScalingConfig,
)
from jaxsparse.config.errors import UserError

REFUSED = {
  'qk_norm': (
    ModelConfig,
    dict(qk_norm='layer'),
    "qk_norm must be one of none, head, projection; got 'layer'.",
  ),
  'bias': (
    ModelConfig,
    dict(bias='mlp'),
    "bias must be one of none, qkv, all; got 'mlp'.",
  ),
  'norm_placement': (
    ModelConfig,
    dict(norm_placement='sandwich'),
    "norm_placement must be one of pre, post; got 'sandwich'.",
  ),
  'mlp': (
    ModelConfig,
    dict(mlp='geglu'),
    "mlp must be one of swiglu, gelu, gelu_erf; got 'geglu'.",
  ),
  'experts with biases': (
    ModelConfig,
    dict(bias='all', moe=MoEConfig()),
    "set bias to 'qkv' or 'none', or unset moe.",
  ),
  'no MLP to norm': (
    ModelConfig,
    dict(
      norm_placement='post',
      memory=MemoryConfig(placements=((1, 1),), replaces_mlp=True),
    ),
    "set norm_placement to 'pre', or unset the other.",
  ),
  'kind of scaling': (
    RopeScalingConfig,
    dict(kind='yarn'),
    "rope_scaling.kind must be one of llama3, linear; got 'yarn'.",
  ),
  'factor': (
    RopeScalingConfig,
    dict(factor=0.5),
    'rope_scaling.factor must be at least 1, got 0.5.',
  ),
  'order': (
    RopeScalingConfig,
    dict(low_frequency_factor=4.0),
    'must be below high_frequency_factor = 4.0, got 4.0.',
  ),
  'length': (
    RopeScalingConfig,
    dict(original_length=0),
    'original_length must be positive, got 0.',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_setting_that_cannot_be_is_one_sentence(name):
  cls, values, said = REFUSED[name]
  with pytest.raises(UserError) as raised:
    cls(**values)
  sentence = str(raised.value)
  assert sentence.endswith(said)
  assert '\n' not in sentence


def test_experts_may_have_biases_of_queries_keys_and_values():
  assert ModelConfig(bias='qkv', moe=MoEConfig()).bias == 'qkv'
