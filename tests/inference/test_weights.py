# SPDX-License-Identifier: Apache-2.0
"""Parameters for serving: spread over a mesh, cast once, still compared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from slot_models import MODELS, V
from small_run import draw_params, save_untrained

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.inference import weights
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import stored


@pytest.mark.parametrize('name', few(['small'], MODELS))
def test_what_is_cast_once_gives_the_same_numbers(name):
  config = dataclasses.replace(MODELS[name], dtype='bfloat16')
  params = draw_params(config, deviation=0.3)
  tokens = jnp.arange(14, dtype=jnp.int32).reshape(2, 7) % V
  logits = jax.jit(
    lambda p: Transformer(config).apply({'params': p}, tokens)[0]
  )
  before = logits(params)
  num_before = sum(x.nbytes for x in jax.tree.leaves(params))
  cast = weights.cast(config, params)
  assert sum(x.nbytes for x in jax.tree.leaves(cast)) < 0.8 * num_before
  np.testing.assert_array_equal(logits(cast), before)


def test_parameters_are_read_to_where_they_belong(tmp_path):
  model = dataclasses.replace(MODELS['small'], vocab_size=257)
  save_untrained(tmp_path, model)
  bf16 = dataclasses.replace(model, dtype='bfloat16')
  step, whole = weights.load(tmp_path, bf16)
  assert step == 3
  devices = mesh.make_mesh(1, 1, 2, devices=jax.devices()[:2])
  _, split = weights.load(tmp_path, bf16, devices=devices)
  jax.tree.map(np.testing.assert_array_equal, split, whole)
  query = split['block_00']['attention']['query']
  assert query.sharding.spec == jax.P('data', 'model', None)
  assert query.dtype == jnp.bfloat16
  other = dataclasses.replace(model, mlp_dim=32)
  with pytest.raises(UserError, match='arrays where this run has'):
    weights.load(tmp_path, other, devices=devices)


def test_they_are_folded_before_they_are_cast(tmp_path):
  """Each number is rounded once; several devices have them as they are."""
  model = dataclasses.replace(MODELS['small'], vocab_size=257)
  save_untrained(tmp_path, model)
  bf16 = dataclasses.replace(model, dtype='bfloat16')
  _, found = weights.load(tmp_path, bf16, is_folded=True)
  assert found['block_00']['attention']['heads'].dtype == jnp.bfloat16
  assert found['block_00']['mlp']['gate_up'].dtype == jnp.bfloat16
  wide = weights.load(tmp_path, model)[1]
  expected = weights.cast(bf16, fold_for_decode(model, wide))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  devices = mesh.make_mesh(1, 1, 2, devices=jax.devices()[:2])
  _, split = weights.load(tmp_path, bf16, devices=devices, is_folded=True)
  assert 'query' in split['block_00']['attention']


def test_a_changed_bit_is_found_on_a_mesh_too(tmp_path, monkeypatch):
  model = dataclasses.replace(MODELS['dense'], vocab_size=257)
  save_untrained(tmp_path, model)

  load = stored.ocp.load_checkpointables

  def hurt(path, abstract):
    arrays = load(path, abstract)
    table = arrays['params']['embed']['table']
    changed = np.array(table)
    changed[1, 1] = np.nextafter(changed[1, 1], np.float32(9))
    arrays['params']['embed']['table'] = jax.device_put(changed, table.sharding)
    return arrays

  monkeypatch.setattr(stored.ocp, 'load_checkpointables', hurt)
  devices = mesh.make_mesh(1, 1, 2, devices=jax.devices()[:2])
  with pytest.raises(UserError, match=r"can't be read .*embed/table differs"):
    weights.load(tmp_path, model, step=3, devices=devices)
