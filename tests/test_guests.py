# SPDX-License-Identifier: Apache-2.0
"""Public layers in programs whose mesh, axes and maps are not ours.

Values and gradients against one device. The default lane takes of the product
of programs, axis names and splits those that differ most; `slow` all of it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lanes import few
from parameters import draw, place

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import (
  DCMHAConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  SparseAttentionConfig,
)
from jaxsparse.nn.attention.dcmha import DCMHA
from jaxsparse.nn.attention.layer import Attention
from jaxsparse.nn.experts import MoE
from jaxsparse.nn.layers import MLP
from jaxsparse.nn.memory.layer import MemoryLayer
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.tables.row_delta import DeltaTable, changed_reference

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
SEED, WIDTH, VOCABULARY = 3, 16, 32

MEMORY = MemoryConfig(
  num_keys=16, key_dim=8, num_selected=4, value_dim=8, placements=((0, 1),)
)
EXPERTS = MoEConfig(num_experts=8, expert_dim=8, num_experts_per_token=2)
MODEL = ModelConfig(
  num_layers=2, model_dim=WIDTH, num_heads=4, num_kv_heads=2, head_dim=8,
  mlp_dim=32, vocab_size=VOCABULARY, memory=MEMORY, moe=EXPERTS,
)  # fmt: skip
# Of a mixture with gates, as the transformer has it, the program is half as
# large again.
LAYERS = dict(
  memory=functools.partial(MemoryLayer, MEMORY),
  pre_values=functools.partial(
    MemoryLayer,
    dataclasses.replace(MEMORY, pre_value_dim=8, query_conv_taps=3),
  ),
  moe=functools.partial(MoE, EXPERTS, kind='gelu'),
  mlp=functools.partial(MLP, 16),
  attention=functools.partial(Attention, MODEL),
  composed=functools.partial(
    Attention, dataclasses.replace(MODEL, dcmha=DCMHAConfig(), query_chunk=4)
  ),
  sparse=functools.partial(
    Attention,
    dataclasses.replace(
      MODEL,
      attention_pattern=('sparse',),
      sparse=SparseAttentionConfig(
        block=2, tile=2, window_blocks=0, max_blocks=2
      ),
    ),
  ),
  dcmha=functools.partial(DCMHA, DCMHAConfig(), 4),
  transformer=functools.partial(Transformer, MODEL),
)

# Lengths of a mesh's axes, axes for a layer, and how its inputs may lie.
MESHES = dict(
  one=(dict(x=4), mesh_lib.Axes(batch=('x',), columns=('x',))),
  two=(dict(dp=2, tp=2), mesh_lib.Axes(batch=('dp',), columns=('tp',))),
  three=(
    dict(pod=2, dp=2, tp=2),
    mesh_lib.Axes(batch=('pod', 'dp'), rows=('tp',), columns=('dp',)),
  ),
)


def splits(axes: dict) -> list[jax.P]:
  """Whole, split over one axis, and over two."""
  first, *others = axes
  more = [jax.P((first, others[0])), jax.P(first, others[-1])] if others else []
  return [jax.P(), jax.P(first), *more]


def inputs_of(name: str) -> jax.Array:
  rng = np.random.default_rng(SEED)
  if name == 'transformer':
    return jnp.asarray(rng.integers(0, VOCABULARY, (8, 8)), jnp.int32)
  return jnp.asarray(rng.normal(size=(8, 8, WIDTH)), jnp.float32)


def outputs(layer: nn.Module, params: dict, x: jax.Array) -> tuple:
  """Output, and metrics if there are any."""
  y, *others = layer.apply({'params': params}, x)
  if isinstance(layer, DCMHA):
    return jnp.stack(list(y.values())).sum(0), {}
  return y, others[-1]


def loss(layer: nn.Module, params: dict, x: jax.Array) -> tuple:
  y, metrics = outputs(layer, params, x)
  # The last position counts differently: a mean would hide a mix-up.
  weights = jnp.linspace(1.0, 2.0, y.shape[-1], dtype=y.dtype)
  total = (jnp.sin(y) * weights[(None,) * (y.ndim - 1)]).sum()
  return total + metrics.get('aux_loss', 0.0), (y, metrics)


def gradient(layer: nn.Module, params: dict, x: jax.Array) -> tuple:
  """Loss, output, metrics and gradients, of the input too where it has one."""
  argnums = (1, 2) if jnp.issubdtype(x.dtype, jnp.floating) else 1
  return jax.value_and_grad(loss, argnums, has_aux=True)(layer, params, x)


@functools.cache
def expected(name: str) -> tuple:
  """Parameters, and what one device makes of them."""
  layer, x = LAYERS[name](), inputs_of(name)
  params = jax.device_put(draw(layer.init, x, deviation=0.2)['params'])
  return params, jax.jit(functools.partial(gradient, layer))(params, x)


def close(actual, desired) -> None:
  def check(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))

  jax.tree.map(check, actual, desired)


def spec_of(path: tuple, x: jax.Array, axes: mesh_lib.Axes) -> jax.P:
  """How a caller would lay a parameter."""
  name, parents = path[-1].key, [k.key for k in path[:-1]]
  rows, columns = axes.rows or None, axes.columns or None
  if name.endswith('_table'):
    return jax.P(rows, columns)
  is_expert = x.ndim == 3 and name in ('up', 'gate', 'down')
  if is_expert and (not parents or parents[-1] == 'moe'):
    return jax.P(*(rows, columns) if name == 'down' else (rows, None, columns))
  return jax.P()


def placed(params: dict, axes: mesh_lib.Axes, mesh: jax.sharding.Mesh) -> dict:
  return jax.tree.map_with_path(
    lambda path, x: jax.device_put(
      x, jax.NamedSharding(mesh, spec_of(path, x, axes))
    ),
    params,
  )


def make_mesh(lengths: dict, *types) -> jax.sharding.Mesh:
  types = (types * len(lengths))[: len(lengths)]
  num_devices = int(np.prod(list(lengths.values())))
  return jax.make_mesh(
    tuple(lengths.values()),
    tuple(lengths),
    axis_types=types,
    devices=jax.devices()[:num_devices],
  )


# In the default lane layers are on a mesh of Explicit axes or of Auto ones, or
# of both in this test and another: that of pre-values in the test of two axes,
# memory there and by its placed table, experts in nnx. A composed layer is its
# parts.
FEW = [
  (name, EXPLICIT, 'three', 2)
  for name in ('mlp', 'attention', 'sparse', 'dcmha')
]
FEW += [(name, AUTO, 'two', 1) for name in ('moe', 'mlp', 'attention')]
CASES = [
  (name, kind, mesh_name, i)
  for name in LAYERS
  for kind, mesh_name in itertools.product((AUTO, EXPLICIT), MESHES)
  for i in range(len(splits(MESHES[mesh_name][0])))
]


@pytest.mark.parametrize(
  ('name', 'kind', 'mesh_name', 'split'), few(FEW, CASES)
)
def test_on_a_mesh_with_other_names(name, kind, mesh_name, split):
  lengths, axes = MESHES[mesh_name]
  spec = splits(lengths)[split]
  params, desired = expected(name)
  mesh = make_mesh(lengths, kind)
  layer = LAYERS[name](axes=axes)
  x = jax.device_put(inputs_of(name), jax.NamedSharding(mesh, spec))
  params = placed(params, axes, mesh)
  with jax.set_mesh(mesh):
    actual = jax.jit(functools.partial(gradient, layer))(params, x)
  close(actual, desired)
  if kind == EXPLICIT:
    (_, (y, _)), _ = actual
    assert tuple(y.sharding.spec[:2]) == (*spec, None, None)[:2]


@pytest.mark.parametrize(
  ('kind', 'columns'),
  few(
    [(EXPLICIT, ('dp', 'tp'))],
    itertools.product((AUTO, EXPLICIT), [('dp', 'tp'), ('tp', 'dp')]),
  ),
)
def test_columns_of_two_axes_keep_their_order(kind, columns):
  """One of them splits the tokens, too."""
  params, desired = expected('pre_values')
  axes = mesh_lib.Axes(('dp',), (), columns)
  layer = LAYERS['pre_values'](axes=axes)
  mesh, x = make_mesh(dict(dp=2, tp=2), kind), inputs_of('pre_values')
  x = jax.device_put(x, jax.NamedSharding(mesh, jax.P('dp')))
  with jax.set_mesh(mesh):
    run = jax.jit(functools.partial(gradient, layer))
    actual = run(placed(params, axes, mesh), x)
  close(actual, desired)


@pytest.mark.parametrize(
  'name',
  # Experts come cut into one below.
  few(['memory', 'mlp', 'attention', 'dcmha'], LAYERS),
)
def test_inside_a_callers_shard_map(name):
  """All axes are Manual: each device runs the layer on its own tokens."""
  params, ((_, (y, _)), gradients) = expected(name)
  of_params = gradients if name == 'transformer' else gradients[0]
  layer, mesh = LAYERS[name](), make_mesh(dict(dp=2, tp=2), AUTO)

  def on_device(params, x):
    def total(params):
      of_device, (y, metrics) = loss(layer, params, x)
      del metrics
      return jax.lax.psum(of_device, 'dp'), y

    return jax.grad(total, has_aux=True)(params)

  mapped = jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(jax.P(), jax.P('dp')),
    out_specs=(jax.P(), jax.P('dp')),
  )
  actual, of_device = jax.jit(mapped)(params, inputs_of(name))
  close(of_device, y)
  if name in ('mlp', 'attention', 'composed', 'dcmha'):  # No aux_loss.
    close(actual, of_params)


@pytest.mark.parametrize(
  ('name', 'rest'),
  few(
    # A memory's axes are all mapped above.
    [('moe', AUTO), ('attention', EXPLICIT)],
    itertools.product(['memory', 'moe', 'attention'], [AUTO, EXPLICIT]),
  ),
)
def test_with_some_axes_mapped_by_the_caller(name, rest):
  params, ((_, (y, _)), _) = expected(name)
  axes = mesh_lib.Axes(batch=('dp',), columns=('tp',))
  mesh, layer = make_mesh(dict(dp=2, tp=2), AUTO, rest), LAYERS[name](axes=axes)

  def on_device(params, x):
    def total(params):
      y, _ = outputs(layer, params, x)
      return jax.lax.psum(jnp.sin(y).sum(), 'dp'), y

    return jax.grad(total, has_aux=True)(params)

  def plain(params):
    return jnp.sin(outputs(LAYERS[name](), params, inputs_of(name))[0]).sum()

  with jax.set_mesh(mesh):
    mapped = jax.shard_map(
      on_device,
      in_specs=(jax.P(), jax.P('dp')),
      out_specs=(jax.P(), jax.P('dp')),
      axis_names={'dp'},
    )
    actual = jax.jit(mapped)(placed(params, axes, mesh), inputs_of(name))
  close(actual, (jax.jit(jax.grad(plain))(params), y))


CUTS = [((), ('tp',)), (('tp',), ()), (('dp',), ('tp',)), (('dp', 'tp'), ())]


@pytest.mark.parametrize(
  ('name', 'rows', 'columns'),
  few(
    [('pre_values', *CUTS[i]) for i in (0, 3)] + [('moe', *CUTS[2])],
    [(name, *cut) for name in ('pre_values', 'moe') for cut in CUTS],
  ),
)
def test_tables_come_cut_into_a_callers_shard_map(name, rows, columns):
  params, ((_, (y, _)), _) = expected(name)
  axes = mesh_lib.Axes(('dp',), rows, columns, inside=True)
  mesh, layer = make_mesh(dict(dp=2, tp=2), AUTO), LAYERS[name](axes=axes)
  specs = jax.tree.map_with_path(functools.partial(spec_of, axes=axes), params)
  mapped = jax.shard_map(
    lambda params, x: outputs(layer, params, x)[0],
    mesh=mesh,
    in_specs=(specs, jax.P('dp')),
    out_specs=jax.P('dp'),
  )
  close(jax.jit(mapped)(params, inputs_of(name)), y)


@pytest.mark.parametrize(
  'name', few(['memory', 'attention'], ['memory', 'moe', 'attention'])
)
def test_under_pmap(name):
  params, ((_, (y, _)), _) = expected(name)
  layer, x = LAYERS[name](), inputs_of(name)
  run = jax.pmap(
    lambda x: outputs(layer, params, x)[0], devices=jax.devices()[:4]
  )
  close(run(x.reshape(4, 2, *x.shape[1:])).reshape(y.shape), y)


class Stack(nn.Module):
  """Layers by `nn.scan`, then layers by `nn.vmap`."""

  make: Callable[[], nn.Module]

  @nn.compact
  def __call__(self, x):
    def add(layer, x, _):
      return x + layer(x)[0], None

    lifted = dict(variable_axes=dict(params=0), split_rngs=dict(params=True))
    x, _ = nn.scan(add, length=2, **lifted)(self.make(), x, None)
    both = nn.vmap(
      lambda layer, x: layer(x)[0], in_axes=None, axis_size=2, **lifted
    )
    return both(self.make(), x)


@pytest.mark.parametrize('kind', few([EXPLICIT], [AUTO, EXPLICIT]))
def test_under_jax_transformations(kind):
  """vmap, remat, arguments placed with no mesh set, scan and vmap of layers."""
  lengths, axes = MESHES['two']
  params, ((_, (y, _)), gradients) = expected('memory')
  mesh, layer = make_mesh(lengths, kind), LAYERS['memory'](axes=axes)
  x = jax.device_put(inputs_of('memory'), jax.NamedSharding(mesh, jax.P('dp')))
  params = placed(params, axes, mesh)

  def run(params, x):
    return outputs(layer, params, x)[0]

  def transformed(params, x):
    both = jax.vmap(run, (None, 0))(params, jnp.stack([x, x + 1]))
    remat = jax.checkpoint(functools.partial(loss, layer))
    return both[0], jax.grad(remat, has_aux=True)(params, x)[0]

  close(jax.jit(run)(params, x), y)
  with jax.set_mesh(mesh):
    close(jax.jit(transformed)(params, x), (y, gradients[0]))
    stack = Stack(functools.partial(LAYERS['memory'], axes=axes))
    variables = place(draw(stack.init, x), stack.init, x)
    through = jax.jit(stack.apply)(variables, x)
    tables = [
      leaf
      for path, leaf in jax.tree.leaves_with_path(variables)
      if path[-1].key == 'value_table'
    ]
    assert all(t.shape[0] == 2 for t in tables)
  whole = jax.jit(Stack(LAYERS['memory']).apply)
  close(through, whole(jax.device_get(variables), inputs_of('memory')))


# What a compiler decides on Auto axes is part of the types on Explicit ones.
@pytest.mark.parametrize('kind', few([AUTO], [AUTO, EXPLICIT]))
def test_a_table_is_placed_as_its_axes_say_and_stays(kind):
  """After `init`, and after a donated step."""
  lengths, _ = MESHES['two']
  axes = mesh_lib.Axes(batch=('dp',), rows=('dp',), columns=('tp',))
  mesh, layer = make_mesh(lengths, kind), LAYERS['memory'](axes=axes)
  x = jax.device_put(inputs_of('memory'), jax.NamedSharding(mesh, jax.P('dp')))

  key = jax.random.key(SEED)
  whole = jax.jit(LAYERS['memory']().init)(key, inputs_of('memory'))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(params, x):
    _, gradients = gradient(layer, params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients[0])

  with jax.set_mesh(mesh):
    params = jax.jit(layer.init)(key, x)['params']
    assert params['value_table'].sharding.spec == jax.P('dp', 'tp')
    close(params, whole['params'])
    compiled = step.lower(params, x).compile()
    params = compiled(params, x)
  assert params['value_table'].sharding.spec == jax.P('dp', 'tp')
  # Nobody gathers the table: 256 rows of 8, here in 4 pieces.
  assert 'f32[256,8]' not in compiled.as_text()


def test_one_layer_under_two_meshes_and_none():
  params, ((_, (y, _)), _) = expected('memory')
  layer = LAYERS['memory'](axes=MESHES['two'][1])
  run = jax.jit(lambda p, x: outputs(layer, p, x)[0])
  x = inputs_of('memory')
  for mesh in (
    make_mesh(dict(dp=2, tp=2), EXPLICIT),
    make_mesh(dict(tp=4, dp=2), AUTO),
  ):
    with jax.set_mesh(mesh):
      close(run(jax.device_put(params, jax.NamedSharding(mesh, jax.P())), x), y)
  close(run(params, x), y)


@pytest.mark.parametrize(
  ('batch_size', 'spec'),
  few(
    [(8, jax.P('model')), (3, jax.P())],
    itertools.product([8, 3], [jax.P(), jax.P('data'), jax.P('model')]),
  ),
)
def test_inputs_that_lie_otherwise_on_our_own_mesh(spec, batch_size):
  params, ((_, (y, _)), _) = expected('moe')
  mesh, layer = mesh_lib.make_mesh(2, 2, 2), LAYERS['moe']()
  if batch_size % 2:
    spec = jax.P()
  x = jax.device_put(
    inputs_of('moe')[:batch_size], jax.NamedSharding(mesh, spec)
  )
  with jax.set_mesh(mesh):
    whole = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    actual = jax.jit(lambda p, x: outputs(layer, p, x)[0])(whole, x)
  close(actual, y[:batch_size])
  assert actual.sharding.spec == jax.P(*spec, *[None] * (3 - len(spec)))


@pytest.mark.parametrize('kind', few([EXPLICIT], [AUTO, EXPLICIT]))
def test_in_nnx(kind):
  lengths, axes = MESHES['two']
  mesh = make_mesh(lengths, kind)
  x = jax.device_put(inputs_of('moe'), jax.NamedSharding(mesh, jax.P('dp')))

  @nnx.jit
  def make(x):
    layer = nnx.bridge.ToNNX(LAYERS['moe'](axes=axes), rngs=nnx.Rngs(SEED))
    return nnx.bridge.lazy_init(layer, x)

  with jax.set_mesh(mesh):
    layer = make(x)
    y = nnx.jit(lambda layer, x: layer(x)[0])(layer, x)
  params = {
    name: jax.device_get(getattr(layer, name)[...])
    for name in expected('moe')[0]
  }
  desired = jax.jit(lambda p, x: outputs(LAYERS['moe'](), p, x)[0])
  close(y, desired(params, inputs_of('moe')))


INPUTS = [
  ((WIDTH,), jnp.bfloat16),
  ((8, WIDTH), jnp.float32),
  ((2, 4, 8, WIDTH), jnp.bfloat16),
  ((0, 8, WIDTH), jnp.float32),
]


@pytest.mark.parametrize(
  ('kind', 'shape', 'dtype'),
  few(
    [
      (AUTO, *INPUTS[0]),
      (EXPLICIT, *INPUTS[2]),
      (AUTO, *INPUTS[3]),
    ],
    [(kind, *case) for kind in (AUTO, EXPLICIT) for case in INPUTS],
  ),
)
def test_any_rank_and_type(shape, kind, dtype):
  """The type of the output is that of the input, as for Flax's own layers."""
  params, _ = expected('memory')
  lengths, axes = MESHES['two']
  mesh, layer = make_mesh(lengths, kind), LAYERS['memory'](axes=axes)
  x = jnp.resize(inputs_of('memory'), int(np.prod(shape))).reshape(shape)
  x = x.astype(dtype)
  with jax.set_mesh(mesh):
    run = jax.jit(lambda p, x: outputs(layer, p, x)[0])
    y = run(placed(params, axes, mesh), x)
  desired = jax.jit(lambda p, x: outputs(LAYERS['memory'](), p, x)[0])(
    params, x
  )
  assert y.shape == shape
  assert y.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(y, np.float32),
    np.asarray(desired, np.float32),
    atol=1e-5 if dtype == jnp.float32 else 3e-2,
  )


@pytest.mark.parametrize('kind', [AUTO, EXPLICIT])
def test_outside_of_jit(kind):
  """Arrays that lie on one device meet the mesh that is set."""
  params, ((_, (y, _)), _) = expected('mlp')
  lengths, axes = MESHES['two']
  with jax.set_mesh(make_mesh(lengths, kind)):
    actual, _ = outputs(LAYERS['mlp'](axes=axes), params, inputs_of('mlp'))
  close(actual, y)


@pytest.mark.parametrize('name', few(['memory'], ['memory', 'moe']))
def test_in_double_precision(name):
  lengths, axes = MESHES['two']
  mesh, layer = make_mesh(lengths, EXPLICIT), LAYERS[name](axes=axes)
  with jax.enable_x64(True):
    params, x = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a), jnp.float64),
      (expected(name)[0], inputs_of(name)),
    )
    run = jax.jit(lambda p, x: outputs(LAYERS[name](), p, x)[0])
    desired = run(params, x)
    with jax.set_mesh(mesh):
      on_mesh = jax.jit(lambda p, x: outputs(layer, p, x)[0])
      actual = on_mesh(placed(params, axes, mesh), x)
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-12)


def test_a_table_with_changed_rows():
  axes = mesh_lib.Axes(batch=('dp',), rows=('dp',), columns=('tp',))
  layer, x = LAYERS['pre_values'](), inputs_of('pre_values')
  params, _ = expected('pre_values')
  rows = np.arange(0, len(params['value_table']), 2, dtype=np.int32)

  def changed(params, kind):
    tables = {
      name: kind(
        table,
        jnp.asarray(rows),
        jnp.full((len(rows), table.shape[1]), 0.5),
      )
      for name, table in params.items()
      if name.endswith('_table')
    }
    return params | tables

  def whole(*arrays):
    return changed_reference(DeltaTable(*arrays))

  run = jax.jit(functools.partial(outputs, layer))
  desired = run(changed(params, whole), x)
  mesh = make_mesh(dict(dp=2, tp=2), EXPLICIT)
  with jax.set_mesh(mesh):
    beside = changed(placed(params, axes, mesh), DeltaTable)
    close(run(beside, jax.device_put(x, jax.P('dp'))), desired)
