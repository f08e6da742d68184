# SPDX-License-Identifier: Apache-2.0
"""Sizes of models that others published, and of all that they need."""

import jax
import jax.numpy as jnp
import pytest

from jaxsparse.analysis import cost
from jaxsparse.config import ModelConfig, MoEConfig, RopeScalingConfig
from jaxsparse.nn.transformer import Transformer

SMALL = dict(num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2)
SMALL |= dict(head_dim=8, mlp_dim=24, vocab_size=23)


@pytest.mark.parametrize(
  ('fields', 'published'),
  [
    # Llama 3.2 of 1B, Qwen2 of 0.5B, OLMo 2 of 7B and OLMoE, as the sizes of
    # their published files have it.
    (
      dict(
        num_layers=16, model_dim=2048, num_heads=32, num_kv_heads=8,
        head_dim=64, mlp_dim=8192, vocab_size=128_256,
        rope_scaling=RopeScalingConfig(factor=32.0),
      ),
      1_235_814_400,
    ),
    (
      dict(
        num_layers=24, model_dim=896, num_heads=14, num_kv_heads=2,
        head_dim=64, mlp_dim=4864, vocab_size=151_936, bias='qkv',
      ),
      494_032_768,
    ),
    (
      dict(
        num_layers=32, model_dim=4096, num_heads=32, num_kv_heads=32,
        head_dim=128, mlp_dim=11_008, vocab_size=100_352, tie_embeddings=False,
        qk_norm='projection', norm_placement='post',
      ),
      7_298_617_344,
    ),
    (
      dict(
        num_layers=16, model_dim=2048, num_heads=16, num_kv_heads=16,
        head_dim=128, vocab_size=50_304, tie_embeddings=False,
        qk_norm='projection',
        moe=MoEConfig(
          num_experts=64, num_experts_per_token=8, expert_dim=1024
        ),
      ),
      6_919_161_856,
    ),
  ],
  ids=['llama', 'qwen2', 'olmo2', 'olmoe'],
)  # fmt: skip
def test_published_models_have_their_sizes(fields, published):
  assert cost.count_parameters(ModelConfig(**fields)).total == published


@pytest.mark.parametrize(
  'fields',
  [
    dict(qk_norm='head', bias='qkv', rope_scaling=RopeScalingConfig()),
    dict(qk_norm='projection', bias='all', mlp='gelu_erf', norm='layer'),
    dict(qk_norm='projection', bias='qkv', moe=MoEConfig(num_experts=4)),
    dict(norm_placement='post', bias='all'),
  ],
  ids=['head', 'projection', 'experts', 'post'],
)
def test_switches_of_published_models_are_counted(fields):
  config = ModelConfig(**SMALL, **fields)
  one = jnp.zeros((1, 1), jnp.int32)
  leaves = jax.eval_shape(Transformer(config).init, jax.random.key(0), one)
  total = cost.count_parameters(config).total
  assert sum(x.size for x in jax.tree.leaves(leaves)) == total
