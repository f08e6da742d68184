# SPDX-License-Identifier: Apache-2.0
"""A workdir as a run leaves it, of a model that has learned nothing."""

import jax
import jax.numpy as jnp

from jaxsparse import config
from jaxsparse.config import saved_config
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import checkpoint


def save_untrained(folder, model):
  """Writes config, tokenizer and a checkpoint of step 3; returns the folder."""
  whole = config.Config(
    model=model, data=config.DataConfig(seq_len=16, cache_dir=str(folder))
  )
  (folder / 'config.json').write_text(saved_config.to_json(whole))
  ByteTokenizer().save(folder)
  one = jnp.ones((1, 2), jnp.int32)
  init = jax.jit(Transformer(model).init)
  params = init(jax.random.key(0), one, one, one)['params']
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  checkpoints.save(3, params, {'step': jnp.int32(3)}, {})
  checkpoints.close()
  return folder
