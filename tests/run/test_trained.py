# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import pytest
from inference.small_run import save_untrained

import jaxsparse
from jaxsparse.config.errors import UserError


def test_load_gives_a_model_that_runs(tmp_path):
  model = jaxsparse.ModelConfig(
    num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=4,
    mlp_dim=8, vocab_size=257,
  )  # fmt: skip
  save_untrained(tmp_path, model)
  config, params = jaxsparse.load(tmp_path)
  assert config.model == model
  ones = jnp.ones((1, 2), jnp.int32)
  logits, _, _ = jax.jit(jaxsparse.Transformer(config.model).apply)(
    {'params': params}, ones, ones, ones
  )
  assert logits.shape == (1, 2, 257)
  with pytest.raises(UserError, match='no checkpoint of step 4: it has'):
    jaxsparse.load(tmp_path, step=4)
