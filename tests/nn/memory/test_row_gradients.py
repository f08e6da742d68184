# SPDX-License-Identifier: Apache-2.0
"""Row-sparse training of models that are none of ours, on meshes of others."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import few

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import MemoryConfig
from jaxsparse.config.errors import UserError
from jaxsparse.nn.memory.layer import MemoryLayer
from jaxsparse.nn.memory.row_gradients import row_value_and_grad
from jaxsparse.nn.memory.tables import SharedTables
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.training.optimizers.finalizing import partition
from jaxsparse.training.optimizers.row_optimizers import row_adagrad, row_adam
from jaxsparse.training.optimizers.row_updates import (
  apply_updates,
  clip_by_global_norm,
  global_norm,
  is_row_gradient,
)

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
CONFIG = MemoryConfig(
  num_keys=32, key_dim=8, num_selected=4, value_dim=8, pre_value_dim=8,
  aux_loss_weight=0.0,
)  # fmt: skip
AXES = {
  'whole': mesh_lib.Axes(batch=('dp',), columns=()),
  'columns': mesh_lib.Axes(batch=('dp',), columns=('tp',)),
  'rows': mesh_lib.Axes(batch=('dp',), rows=('tp',), columns=()),
  'both': mesh_lib.Axes(batch=('dp',), rows=('dp',), columns=('tp',)),
}


class Model(nn.Module):
  """Layers of any name, one called twice, one rematerialised."""

  axes: mesh_lib.Axes = mesh_lib.DEFAULT_AXES

  @nn.compact
  def __call__(self, x):
    layer = functools.partial(MemoryLayer, CONFIG, axes=self.axes)
    twice = layer(name='whatever')
    x = x + twice(x)[0]
    x = x + nn.remat(MemoryLayer)(CONFIG, axes=self.axes, name='other')(x)[0]
    x = nn.LayerNorm()(x)
    return nn.Dense(4)(x + twice(x)[0])


def loss(apply, params, x, axes=mesh_lib.DEFAULT_AXES):
  y = apply(Model(axes), params, x)
  return jnp.mean(jnp.square(y - jnp.arange(4.0)[None, None]))


def plain_apply(module, params, *args):
  return module.apply({'params': params}, *args)


@functools.cache
def start():
  """Inputs, parameters, and value and gradients of one device."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 16)), jnp.float32)
  params = jax.jit(Model().init)(jax.random.key(0), x)['params']
  dense = jax.value_and_grad(functools.partial(loss, plain_apply))
  return x, params, jax.jit(dense)(params, x)


def is_table(path):
  return path[-1].key.endswith('_table')


def dense_tables(gradients, params):
  """What the gradients say of each table, as an array."""
  zeros = jax.tree.map(jnp.zeros_like, params)
  return apply_updates(zeros, gradients)


def close(actual, desired, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), atol=atol
    ),
    actual,
    desired,
  )


def make_mesh(kind):
  return jax.make_mesh(
    (2, 2), ('dp', 'tp'), axis_types=(kind,) * 2, devices=jax.devices()[:4]
  )


def placed(mesh, axes, params, x):
  def place(path, leaf):
    spec = jax.P()
    if is_table(path):
      spec = jax.P(axes.rows or None, axes.columns or None)
    return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

  x = jax.device_put(x, jax.NamedSharding(mesh, jax.P('dp')))
  return jax.tree.map_with_path(place, params), x


def test_gradients_are_those_of_jax_by_rows():
  x, params, (desired, dense) = start()
  run = jax.jit(row_value_and_grad(loss))
  value, gradients = run(params, x)
  np.testing.assert_allclose(value, desired, rtol=1e-6)
  leaves = jax.tree.leaves_with_path(gradients, is_leaf=is_row_gradient)
  assert [is_table(p) for p, g in leaves] == [
    is_row_gradient(g) for p, g in leaves
  ]
  close(jax.jit(dense_tables)(gradients, params), dense)
  np.testing.assert_allclose(
    global_norm(gradients), optax.global_norm(dense), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('cut', 'kind'),
  few(
    [('both', EXPLICIT), ('rows', AUTO), ('columns', EXPLICIT)],
    itertools.product(AXES, [AUTO, EXPLICIT]),
  ),
)
def test_on_a_mesh_with_other_names(cut, kind):
  x, params, (desired, dense) = start()
  mesh, axes = make_mesh(kind), AXES[cut]
  params, x = placed(mesh, axes, params, x)
  with jax.set_mesh(mesh):

    @jax.jit
    def run(params, x):
      value, gradients = row_value_and_grad(functools.partial(loss, axes=axes))(
        params, x
      )
      return value, dense_tables(gradients, params)

    value, gradients = run(params, x)
  np.testing.assert_allclose(value, desired, rtol=1e-5)
  close(gradients, dense)


def optimizer_of(tables, params):
  labels = jax.tree.map_with_path(
    lambda path, _: 'tables' if is_table(path) else 'rest', params
  )
  groups = dict(tables=tables, rest=optax.adam(1e-2))
  return partition(groups, labels)


TABLES = dict(
  row_adam=lambda: row_adam(1e-2),
  lazy_row_adam=lambda: row_adam(1e-2, catch_up=False),
  row_adagrad=lambda: row_adagrad(1e-1),
)


def steps_of(optimizer, axes, num_steps=2):
  """A function that takes a few steps, with clipping."""
  value_and_grad = row_value_and_grad(functools.partial(loss, axes=axes))
  clip = clip_by_global_norm(0.5)

  def run(params, x):
    state = optimizer.init(params)
    for i in range(num_steps):
      _, gradients = value_and_grad(params, x + i)
      gradients, _ = clip.update(gradients, clip.init(params))
      updates, state = optimizer.update(gradients, state, params)
      params = apply_updates(params, updates)
    return optimizer.finalize(params, state)[0]

  return run


@functools.cache
def trained(name):
  x, params, _ = start()
  optimizer = optimizer_of(TABLES[name](), params)
  return jax.jit(steps_of(optimizer, mesh_lib.DEFAULT_AXES))(params, x)


def test_row_adam_is_adam():
  x, params, _ = start()
  optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))

  @jax.jit
  def run(params, x):
    state = optimizer.init(params)
    for i in range(2):
      gradients = jax.grad(functools.partial(loss, plain_apply))(params, x + i)
      updates, state = optimizer.update(gradients, state, params)
      params = optax.apply_updates(params, updates)
    return params

  # Where a gradient is nearly 0, rounding decides much of Adam's first steps.
  close(trained('row_adam'), run(params, x), atol=2e-4)


@pytest.mark.parametrize(
  ('name', 'cut', 'kind'),
  [
    ('row_adam', 'both', EXPLICIT),
    pytest.param('row_adam', 'rows', AUTO, marks=pytest.mark.slow),
    pytest.param('lazy_row_adam', 'columns', EXPLICIT, marks=pytest.mark.slow),
    pytest.param('row_adagrad', 'both', AUTO, marks=pytest.mark.slow),
    pytest.param('row_adagrad', 'whole', EXPLICIT, marks=pytest.mark.slow),
  ],
)
def test_optimizers_take_the_same_steps_on_a_mesh(name, cut, kind):
  x, params, _ = start()
  mesh, axes = make_mesh(kind), AXES[cut]
  params, x = placed(mesh, axes, params, x)
  with jax.set_mesh(mesh):
    run = jax.jit(steps_of(optimizer_of(TABLES[name](), params), axes))
    actual = run(params, x)
  close(actual, trained(name), atol=2e-4)


def test_no_array_of_a_tables_size_is_made():
  """A table has 1,024 rows of 8; no zeros of this shape are filled."""
  x, params, _ = start()
  optimizer = optimizer_of(row_adagrad(1e-2), params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, x):
    _, gradients = row_value_and_grad(loss)(params, x)
    updates, state = optimizer.update(gradients, state, params)
    return apply_updates(params, updates), state

  text = step.lower(params, optimizer.init(params), x).compile().as_text()
  zeros = [
    line
    for line in text.splitlines()
    if ' = f32[1024,8]' in line and ' broadcast(' in line
  ]
  assert not zeros


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    tables = SharedTables(SHARED, x.shape[-1], name='store')()
    for name in ('first', 'second'):
      x = x + MemoryLayer(SHARED, name=name)(x, tables=tables)[0]
    return x


SHARED = MemoryConfig(
  num_keys=16, key_dim=8, num_selected=4, value_dim=8, shared_rows=256,
  aux_loss_weight=0.0,
)  # fmt: skip


def test_a_shared_table_and_a_part_of_the_parameters():
  x, _, _ = start()
  params = dict(
    inner=jax.jit(Shared().init)(jax.random.key(1), x)['params'], scale=2.0
  )

  def loss(apply, params, x):
    return (
      jnp.sum(jnp.sin(apply(Shared(), params['inner'], x))) * params['scale']
    )

  _, gradients = jax.jit(row_value_and_grad(loss))(params, x)
  assert isinstance(gradients['inner']['store']['value_table'], RowGradient)
  dense = jax.jit(jax.grad(functools.partial(loss, plain_apply)))(params, x)
  close(jax.jit(dense_tables)(gradients, params), dense, atol=1e-4)


def test_parameters_of_another_making_are_refused():
  x, params, _ = start()

  def loss(apply, params, x):
    copies = jax.tree.map(lambda p: p * 1, params)
    return jnp.sum(apply(Model(), copies, x))

  with pytest.raises(UserError, match='apply must get the params of loss'):
    row_value_and_grad(loss)(params, x)


def test_mutable_collections_and_an_auxiliary_value_are_kept():
  x, params, (desired, dense) = start()

  def loss(apply, params, x):
    y, sown = apply(Model(), params, x, mutable=['intermediates'])
    total = jnp.mean(jnp.square(y - jnp.arange(4.0)[None, None]))
    return total, sown

  (value, sown), gradients = jax.jit(row_value_and_grad(loss, has_aux=True))(
    params, x
  )
  np.testing.assert_allclose(value, desired, rtol=1e-6)
  assert set(sown) == {'intermediates'}
  close(jax.jit(dense_tables)(gradients, params), dense)
