"""What the README says, runs."""

import pathlib
import re

import jax
import numpy as np

from jaxsparse.run import command_line

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


def test_layer_in_linen_and_in_nnx():
  linen, nnx_block = blocks('python')
  names = {}
  exec(linen, names)
  assert names['y'].shape == (2, 16, 128)
  table = names['params']['params']['MemoryLayer_0']['value_table']
  assert table.shape == (4096, 64)

  def loss(params):
    y, aux_loss = names['Block']().apply(params, names['x'])
    return y.sum() + aux_loss

  gradient = jax.jit(jax.grad(loss))(names['params'])
  touched = np.any(gradient['params']['MemoryLayer_0']['value_table'], axis=1)
  assert 0 < touched.sum() <= 2 * 16 * 32

  exec(nnx_block, names)
  assert names['y'].shape == (2, 16, 128)
  assert not np.allclose(names['y'], names['x'])

  from flax import nnx

  def nnx_loss(module):
    return module(names['x'])[0].sum()

  gradient = nnx.jit(nnx.grad(nnx_loss))(names['layer'])
  assert np.any(gradient['value_table'])


def test_length_and_commands():
  assert len(README.splitlines()) < 150
  commands = re.findall(r'^python -m venv .*', README, re.MULTILINE)
  assert len(commands) == 2
  for name in re.findall(r'--config=(\S+)', README):
    if name not in ('NAME', '...'):
      command_line.read_recipe(name)
