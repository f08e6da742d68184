# SPDX-License-Identifier: Apache-2.0
"""What an import gives, as a function of tokens."""

import functools

import jax
import numpy as np
from imported import read

from jaxsparse.nn.transformer import Transformer


def loaded(opened):
  """The model, its parameters on no mesh, and its logits as a function."""
  params = jax.tree.map(np.asarray, read(opened))
  model = Transformer(opened.config)
  return model, params, functools.partial(_logits, model)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
  return model.apply({'params': params}, tokens)[0]
