# SPDX-License-Identifier: Apache-2.0
"""An extended model is the same function at first, and can be trained on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.small_run import draw_params, save_untrained
from lanes import few

import jaxsparse
from jaxsparse import config, mesh
from jaxsparse.cli import convert_add_memory
from jaxsparse.config.errors import UserError
from jaxsparse.interop import our_leaves, upcycling
from jaxsparse.nn import added_parts
from jaxsparse.nn.language_model import LanguageModel
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import run_config

DENSE = config.ModelConfig(
  num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
  mlp_dim=16, vocab_size=257,
)  # fmt: skip
# The programs run once: compiling them well would take most of the time.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)
SMALL = dict(num_keys=8, num_selected=4)
TOKENS = np.arange(32).reshape(8, 4) * 7 % 257


def small(preset):
  """The dense model with a small part of the preset."""
  model = upcycling.with_part(DENSE, preset)
  if preset == 'moe':
    part = dataclasses.replace(model.moe, num_experts=4)
    return dataclasses.replace(model, moe=part)
  if preset == 'dcmha':
    part = dataclasses.replace(model.dcmha, base=True)
    return dataclasses.replace(model, dcmha=part)
  sizes = dict(SMALL)
  if model.memory.shared_rows:
    sizes['shared_rows'] = 64
  part = dataclasses.replace(model.memory, **sizes)
  return dataclasses.replace(model, memory=part)


def logits(model, params):
  run = jit(LanguageModel(model).apply)
  return np.asarray(run({'params': params}, TOKENS))


def shapes(model):
  one = jnp.ones((8, 1), jnp.int32)
  init = Transformer(model).init
  return jax.eval_shape(init, jax.random.key(0), one)['params']


# The command adds UltraMem, which takes longer to compile.
FEW = ['pkm', 'dcmha']


@pytest.mark.parametrize('preset', few(FEW, upcycling.PRESETS))
def test_the_function_stays_and_learns(preset):
  new, field = small(preset), upcycling.field_of(preset)
  upcycling.require_same_function(DENSE, new, field)
  params = draw_params(DENSE, 0.3)
  extended = added_parts.extend(DENSE, new, params)
  types = jax.tree.map(lambda x: (x.shape, x.dtype), extended)
  assert types == jax.tree.map(lambda x: (x.shape, x.dtype), shapes(new))
  before, after = logits(DENSE, params), logits(new, extended)
  if field == 'memory':
    np.testing.assert_array_equal(after, before)
  else:
    limit = 1e-6 * np.abs(before).max()
    np.testing.assert_allclose(after, before, rtol=0, atol=limit)

  @jit
  @jax.grad
  def gradient(params):
    tokens = jnp.asarray(TOKENS)
    scores = LanguageModel(new).apply({'params': params}, tokens[:, :-1])
    scores = jax.nn.log_softmax(scores)
    return -jnp.take_along_axis(scores, TOKENS[:, 1:, None], -1).mean()

  by_name = our_leaves.flat(gradient(extended))
  silent = dict(
    moe=('moe/up', 'moe/router'), dcmha=('low_rank', 'gate', 'post_base'),
    pkm=('value_table',), peer=('value_table',),
  ).get(preset, ('memory/output',))  # fmt: skip
  for ending in silent:
    found = [np.abs(g).max() for n, g in by_name.items() if n.endswith(ending)]
    assert found
    assert max(found) > 0, ending


@pytest.mark.parametrize('preset', few(['memory_plus'], ['memory_plus', 'moe']))
def test_on_a_mesh(preset):
  """As on one device, the drawn parts among it."""
  new = small(preset)
  params = draw_params(DENSE, 0.3)
  alone = added_parts.extend(DENSE, new, params)
  with jax.set_mesh(mesh.make_mesh(2, 2, 2)):
    laid = mesh.abstract(
      lambda: Transformer(DENSE).init(
        jax.random.key(0), jnp.ones((8, 1), jnp.int32)
      )['params'],
      mesh=jax.sharding.get_mesh(),
    )
    params = jax.tree.map(
      lambda x, of: jax.device_put(x, of.sharding), params, laid
    )
    extended = added_parts.extend(DENSE, new, params)
  jax.tree.map(np.testing.assert_array_equal, extended, alone)


def test_the_command(tmp_path, capsys):
  deeper = dataclasses.replace(DENSE, num_layers=2)
  save_untrained(tmp_path, deeper, 0.3)
  out = tmp_path / 'more'
  flags = [f'--workdir={tmp_path}', f'--out={out}', '--preset=ultramem']
  memory = '--config.model.memory'
  convert_add_memory.main(
    [*flags, f'{memory}.num_keys=8', f'{memory}.num_selected=4']
  )
  assert 'jaxsparse train --workdir=' in capsys.readouterr().out
  placements = run_config.read(out).model.memory.placements
  assert placements == ((0, 1), (1, 1))
  old, new = (jaxsparse.load(folder) for folder in (tmp_path, out))
  np.testing.assert_array_equal(*(logits(m.config, p) for m, p in (old, new)))
  with pytest.raises(UserError, match=r'^--out=.* must be new or an empty'):
    convert_add_memory.main(flags)
  with pytest.raises(UserError, match='the model has memory already'):
    convert_add_memory.main([f'--workdir={out}', f'--out={out}/a'])


@pytest.mark.parametrize(
  ('preset', 'flag', 'message'),
  [
    ('ultramem', '--config.model.mlp_dim=32', 'only fields of model.memory'),
    ('peer', '--config.model.memory.replaces_mlp=true', 'throw trained MLPs'),
    ('moe', '--config.model.moe.expert_dim=8', 'the width of the MLPs'),
    ('moe', '--config.model.moe.num_shared=1', 'weights that add up to one'),
    ('moe', '--config.model.bias=all', 'bias'),
  ],
)  # fmt: skip
def test_another_function_is_refused(preset, flag, message):
  whole = config.Config(model=DENSE)
  with pytest.raises(UserError, match=message):
    convert_add_memory.extended(whole, preset, [flag])
