# SPDX-License-Identifier: Apache-2.0
"""Row-sparse training of models that are none of ours, on meshes of others."""

import functools
import itertools
import re
from typing import NamedTuple

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
# Quick to compile.
OTHER = MemoryConfig.pkm(num_keys=32, key_dim=8, num_selected=4, value_dim=16)
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
    x = x + nn.remat(MemoryLayer)(OTHER, axes=self.axes, name='other')(x)[0]
    x = nn.LayerNorm()(x)
    return nn.Dense(4)(x + twice(x)[0])


def loss(apply, params, x, axes=mesh_lib.DEFAULT_AXES):
  y = apply(Model(axes), params, x)
  return jnp.mean(jnp.square(y - jnp.arange(4.0)[None, None]))


def plain_apply(module, params, *args, **kwargs):
  return module.apply({'params': params}, *args, **kwargs)


def drawn(model, x):
  """Parameters from NumPy, as a compiled draw takes seconds."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda p: rng.normal(0.0, 0.3, p.shape).astype(p.dtype),
    jax.eval_shape(model.init, jax.random.key(0), x)['params'],
  )


@functools.cache
def start():
  """Parameters and inputs."""
  x = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(np.float32)
  return drawn(Model(), x), x


def is_table(path):
  return path[-1].key.endswith('_table')


@jax.jit
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


class Steps(NamedTuple):
  """Two steps: loss, gradients and their norm at the first, and the end."""

  value: jax.Array
  gradients: dict
  norm: jax.Array
  params: dict


def two_steps(value_and_grad, norm, clip, optimizer, add, params, x):
  def step(carry, shift):
    params, state = carry
    value, gradients = value_and_grad(params, x + shift)
    clipped, _ = clip.update(gradients, clip.init(params))
    updates, state = optimizer.update(clipped, state, params)
    return (add(params, updates), state), (value, gradients, norm(gradients))

  # A loop is traced and compiled once for both.
  end, found = jax.lax.scan(step, (params, optimizer.init(params)), SHIFTS)
  return end, jax.tree.map(lambda x: x[0], found)


SHIFTS = np.arange(2.0, dtype=np.float32)


def steps_of(name, axes, params, x):
  """`Steps` by rows, on the mesh in use."""
  optimizer = optimizer_of(TABLES[name](), params)
  value_and_grad = row_value_and_grad(functools.partial(loss, axes=axes))

  @jax.jit
  def run(params, x):
    end, found = two_steps(
      value_and_grad, global_norm, clip_by_global_norm(0.5), optimizer,
      apply_updates, params, x,
    )  # fmt: skip
    return *found, optimizer.finalize(*end)[0]

  return Steps(*run(params, x))


@functools.cache
def by_rows(name='row_adam'):
  return steps_of(name, mesh_lib.DEFAULT_AXES, *start())


@functools.cache
def dense():
  """`Steps` of JAX's gradients with optax's Adam."""

  @jax.jit
  def run(params, x):
    (params, _), found = two_steps(
      jax.value_and_grad(functools.partial(loss, plain_apply)),
      optax.global_norm, optax.clip_by_global_norm(0.5), optax.adam(1e-2),
      optax.apply_updates, params, x,
    )  # fmt: skip
    return *found, params

  return Steps(*run(*start()))


def test_gradients_are_those_of_jax_by_rows():
  rows, desired = by_rows(), dense()
  np.testing.assert_allclose(rows.value, desired.value, rtol=1e-6)
  leaves = jax.tree.leaves_with_path(rows.gradients, is_leaf=is_row_gradient)
  assert [is_table(p) for p, g in leaves] == [
    is_row_gradient(g) for p, g in leaves
  ]
  close(dense_tables(rows.gradients, start()[0]), desired.gradients)
  np.testing.assert_allclose(rows.norm, desired.norm, rtol=1e-5)


def test_row_adam_is_adam():
  # Where a gradient is nearly 0, rounding decides much of Adam's first steps.
  close(by_rows().params, dense().params, atol=2e-4)


@pytest.mark.parametrize(
  ('cut', 'kind'),
  # The steps below have the gradients of another cut.
  few([('rows', AUTO)], itertools.product(AXES, [AUTO, EXPLICIT])),
)
def test_on_a_mesh_with_other_names(cut, kind):
  mesh, axes = make_mesh(kind), AXES[cut]
  params, x = placed(mesh, axes, *start())
  with jax.set_mesh(mesh):

    @jax.jit
    def run(params, x):
      value, gradients = row_value_and_grad(functools.partial(loss, axes=axes))(
        params, x
      )
      return value, dense_tables(gradients, params)

    value, gradients = run(params, x)
  np.testing.assert_allclose(value, dense().value, rtol=1e-5)
  close(gradients, dense().gradients)


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
  mesh, axes = make_mesh(kind), AXES[cut]
  params, x = placed(mesh, axes, *start())
  with jax.set_mesh(mesh):
    actual = steps_of(name, axes, params, x)
    gradients = dense_tables(actual.gradients, params)
  np.testing.assert_allclose(actual.value, dense().value, rtol=1e-5)
  close(gradients, dense().gradients)
  close(actual.params, by_rows(name).params, atol=2e-4)


def test_no_array_of_a_tables_size_is_made():
  """Tables have 1,024 rows of 8 or 16; no zeros of these shapes are filled."""
  params, x = start()
  optimizer = optimizer_of(row_adagrad(1e-2), params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, x):
    _, gradients = row_value_and_grad(loss)(params, x)
    updates, state = optimizer.update(gradients, state, params)
    return apply_updates(params, updates), state

  state = jax.eval_shape(optimizer.init, params)
  text = step.lower(params, state, x).compile().as_text()
  zeros = [
    line
    for line in text.splitlines()
    if re.search(r' = f32\[1024,(8|16)\].* broadcast\(', line)
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


@functools.cache
def of_shared():
  """Loss, what was sown, gradients by rows, and all three of JAX."""
  x = start()[1]
  params = dict(inner=drawn(Shared(), x), scale=2.0)

  def loss(apply, params, x):
    y, sown = apply(Shared(), params['inner'], x, mutable=['intermediates'])
    return jnp.sum(jnp.sin(y)) * params['scale'], sown

  @jax.jit
  def run(params, x):
    by_rows = row_value_and_grad(loss, has_aux=True)(params, x)
    dense = jax.value_and_grad(
      functools.partial(loss, plain_apply), has_aux=True
    )
    return by_rows, dense(params, x)

  return params, *run(params, x)


def test_a_shared_table_and_a_part_of_the_parameters():
  params, (_, gradients), (_, desired) = of_shared()
  assert isinstance(gradients['inner']['store']['value_table'], RowGradient)
  close(dense_tables(gradients, params), desired, atol=1e-4)


def test_mutable_collections_and_an_auxiliary_value_are_kept():
  params, ((value, sown), rows), ((desired, as_sown), dense) = of_shared()
  np.testing.assert_allclose(value, desired, rtol=1e-6)
  assert set(sown) == {'intermediates'}
  close(sown, as_sown)
  close(dense_tables(rows, params), dense, atol=1e-4)


def test_parameters_of_another_making_are_refused():
  params, x = start()

  def loss(apply, params, x):
    copies = jax.tree.map(lambda p: p * 1, params)
    return jnp.sum(apply(Model(), copies, x))

  with pytest.raises(UserError, match='apply must get the params of loss'):
    row_value_and_grad(loss)(params, x)
