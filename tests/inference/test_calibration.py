# SPDX-License-Identifier: Apache-2.0
"""Rounding by a text leaves more of what a model makes of it."""

import dataclasses

import jax
import numpy as np
from slot_models import MODELS, V, make_params

from jaxsparse.inference.calibration import moments_of_inputs, quantize_by_text
from jaxsparse.inference.quantize import Quantization, map_leaves, quantize
from jaxsparse.nn.transformer import Transformer

CONFIG = dataclasses.replace(MODELS['dense'], num_layers=1)
HOW = Quantization(weights='int4')


def test_logits_err_less_and_the_form_is_the_same():
  rng = np.random.default_rng(0)
  # What is rounded by the first half is measured by the second.
  rows = rng.integers(0, V, (8, 32), np.int32)
  held_out = jax.device_put(rows[4:])
  params = jax.device_put(make_params(CONFIG)['params'])
  logits = jax.jit(
    lambda p: Transformer(CONFIG).apply({'params': p}, held_out)[0]
  )
  expected = logits(params)
  # The vocabulary's errors are the same in both.
  plain = quantize(CONFIG, params, HOW)
  by_text = quantize_by_text(CONFIG, params, HOW, rows[:4])
  assert jax.tree.structure(plain) == jax.tree.structure(by_text)

  def same_form(path, x):
    other = by_text
    for name in path:
      other = other[name]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), other) == jax.tree.map(
      lambda a: (a.shape, a.dtype), x
    )

  map_leaves(same_form, plain)

  def error(quantized):
    exact = {**quantized, 'embed': params['embed']}
    return np.square(np.asarray(logits(exact) - expected)).mean()

  assert error(by_text) < 0.8 * error(plain)


def test_moments_are_those_of_the_inputs_of_each_matrix():
  params = jax.device_put(make_params(CONFIG)['params'])
  rows = np.random.default_rng(1).integers(0, V, (6, 8), np.int32)
  moments = moments_of_inputs(CONFIG, params, rows)
  assert {name.removeprefix('block_00/') for name in moments} >= {
    *('attention/' + name for name in ('query', 'key', 'value', 'output')),
    *('mlp/' + name for name in ('gate', 'up', 'down')),
  }
  # Queries read what the norm makes of the tokens.
  x = np.asarray(params['embed']['table'])[rows].reshape(-1, 16)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
  x = x * np.asarray(params['block_00']['attention_norm']['scale'])
  np.testing.assert_allclose(
    moments['block_00/attention/query'], x.T @ x, rtol=1e-4, atol=1e-4
  )
