# SPDX-License-Identifier: Apache-2.0
"""A program of a guest, for pyright: each public name has the type it shows.

Never run; `assert_type` of what pyright takes for unknown is an error.
"""

from typing import Any, assert_type

import jax

import jaxsparse
from jaxsparse import (
  DCMHA,
  DCMHAConfig,
  MemoryConfig,
  MemoryLayer,
  ModelConfig,
  MoE,
  MoEConfig,
  SparseAttentionConfig,
  Transformer,
)
from jaxsparse.nn.language_model import LanguageModel
from jaxsparse.training.optimizers.finalizing import Optimizer


def layers(x: jax.Array, tokens: jax.Array) -> None:
  memory = MemoryLayer(MemoryConfig(num_keys=64))
  y, metrics = memory(x)
  assert_type(y, jax.Array)
  assert_type(metrics['aux_loss'], jax.Array)
  y, _ = MoE(MoEConfig(num_experts=4))(x)
  assert_type(y, jax.Array)
  factors, _ = DCMHA(DCMHAConfig(), num_heads=4)(x)
  assert_type(factors['pre', 'query'], jax.Array)
  config = ModelConfig(
    attention_pattern=('sparse',), sparse=SparseAttentionConfig()
  )
  logits, _, _ = Transformer(config)(tokens, tokens, tokens)
  assert_type(logits, jax.Array)


def functions(x: jax.Array, slot: jax.Array) -> None:
  assert_type(jaxsparse.value_bag(x, slot, x), jax.Array)
  assert_type(jaxsparse.product_key_top_m(x, x, 4), tuple[jax.Array, jax.Array])
  assert_type(jaxsparse.tucker_top_m(x, x, x, 4), tuple[jax.Array, jax.Array])
  for optimizer in (jaxsparse.row_adam(1e-3), jaxsparse.row_adagrad(1e-3)):
    assert_type(optimizer, Optimizer)
  loaded = jaxsparse.load('runs/tiny')
  assert_type(loaded, tuple[LanguageModel, dict[str, Any]])
  assert_type(jaxsparse.__version__, str)
