# SPDX-License-Identifier: Apache-2.0
"""A workdir as a run leaves it, of a model that has learned nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import config
from jaxsparse.config import saved_config
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import checkpoint


def draw_params(model, deviation=0.05):
  """Parameters drawn by NumPy: the model's own start would be compiled."""

  def init():
    one = jnp.ones((1, 2), jnp.int32)
    return Transformer(model).init(jax.random.key(0), one, one, one)['params']

  rng = np.random.default_rng(0)

  def draw(path, x):
    mean = 1 if path[-1].key == 'scale' else 0
    return jnp.asarray(rng.normal(mean, deviation, x.shape).astype(x.dtype))

  return jax.tree.map_with_path(draw, jax.eval_shape(init))


def save_untrained(folder, model, deviation=0.05, seq_len=16):
  """Writes config, tokenizer and a checkpoint of step 3; returns the folder."""
  whole = config.Config(
    model=model,
    data=config.DataConfig(seq_len=seq_len, cache_dir=str(folder)),
  )
  (folder / 'config.json').write_text(saved_config.to_json(whole))
  ByteTokenizer().save(folder)
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  params = draw_params(model, deviation)
  checkpoints.save(3, params, {'step': jnp.int32(3)}, {})
  checkpoints.close()
  return folder
