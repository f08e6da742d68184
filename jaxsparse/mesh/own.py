# SPDX-License-Identifier: Apache-2.0
"""Our own mesh and its axes: the only file that names them.

Every array's sharding is looked up letter by letter from the alphabet of
dimensions (B batch, T positions, D model width, N query heads, K key/value
heads, H head width, F feed-forward width, X experts, V vocabulary, M slots, W
value width, Q sub-keys, P memory heads). A value table's rows and columns are
split as its scheme says, see `TABLE_LAYOUTS`. The mesh always has all of its
axes, of length 1 when unused, so that no rule is conditional. With no mesh set,
and on the mesh of somebody else (`jaxsparse.mesh.guest`), every lookup gives
None, and the same code runs on what one device holds.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax

from jaxsparse.config.errors import UserError
from jaxsparse.mesh import guest
from jaxsparse.mesh.layout import TABLE_LAYOUTS, TOKENS, TableLayout

AXES = ('data', 'sparse', 'model')
_EXPLICIT = jax.sharding.AxisType.Explicit

ACTIVATION = dict(B=TOKENS, N='model', K='model', F='model', W='model')
PARAMETER = dict(
  D='data', N='model', K='model', F='model', W='model', X='sparse'
)


def make_mesh(
  data: int = -1,
  sparse: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """An explicit mesh over `devices`; `data=-1` takes all that are left.

  Raises:
    UserError: the axes do not make up the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  inner = sparse * model
  if data == -1:
    data = len(devices) // inner
  if data < 1 or data * inner != len(devices):
    raise UserError(
      f'mesh.data x mesh.sparse x mesh.model = {data} x {sparse} x {model} '
      f'must make up the {len(devices)} devices at hand.'
    )
  return jax.make_mesh((data, sparse, model), AXES, devices=devices)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': of the mesh in use, without one of `jax.devices()`.

  So a program compiled ahead of time, for a device that this process lacks, has
  the forms that are fast there.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  # As `jax.default_backend` says it.
  return 'gpu' if device.platform in ('cuda', 'rocm') else device.platform


def _spec(rules: dict, dims: str) -> jax.P | None:
  if axis_sizes() is None:
    return None
  return jax.P(*(rules.get(dim) for dim in dims))


def act(dims: str) -> jax.P | None:
  """Sharding of an activation: act('TF') is P(None, 'model')."""
  return _spec(ACTIVATION, dims)


def partial(dims: str) -> jax.P | None:
  """Sharding of an activation whose sum over `model` is still to be taken.

  `reshard(x, act(dims))` takes it; partial results are added first, so that
  several of them cross the wire as one.
  """
  spec = act(dims)
  # Over an axis of length 1 there is nothing to add up, and JAX 0.10.2 cannot
  # lower a shard_map that says so on one device.
  if spec is None or axis_sizes()['model'] == 1:
    return spec
  return jax.P(*spec, unreduced={'model'})


def table_layout(scheme: str) -> TableLayout:
  """The layout of `scheme` on the mesh in use.

  An axis of length 1 that splits nothing is listed among those of the rows:
  nothing is then summed over it, which some backends do with a copy.
  """
  layout, axes = TABLE_LAYOUTS[scheme], axis_sizes()
  idle = tuple(a for a in layout.copies if axes[a] == 1)
  return dataclasses.replace(layout, rows=idle + layout.rows)


def table(scheme: str) -> jax.P | None:
  """Sharding of a value table [M, W]; a guest's as its axes say."""
  if axis_sizes() is None:
    return guest.placement('MW')
  return table_layout(scheme).spec


def split_copies(x: jax.Array, scheme: str) -> jax.Array:
  """A value table's copies, or what has its shape, each cut down to some rows.

  `x` itself where there are no copies or their rows can't be split evenly.
  """
  if axis_sizes() is None:
    return x
  layout = table_layout(scheme)
  rows = layout.rows + layout.copies
  if x.shape[0] % math.prod(axis_sizes()[a] for a in rows):
    return x
  return jax.sharding.reshard(x, jax.P(rows or None, layout.columns))


def axis_sizes() -> dict[str, int] | None:
  """Length of every axis of our own mesh; None where it is not in use."""
  types = guest.axis_types()
  if guest.inside() is not None:  # What is behind a door knows of no mesh.
    return None
  if set(types) != set(AXES) or set(types.values()) != {_EXPLICIT}:
    return None
  return dict(jax.sharding.get_abstract_mesh().shape)


def param(dims: str) -> jax.P | None:
  """Sharding of a parameter: param('DF') is P('data', 'model')."""
  if 'X' in dims and axis_sizes() is None:
    return guest.placement(dims)
  return _spec(PARAMETER, dims)


def gather(x: jax.Array, dims: str) -> jax.Array:
  """The parameter `x` as it takes part in a computation.

  Parameters are stored spread over `data`; here that axis is gathered, and
  what `model` splits stays split. The gradient is reduce-scattered back.
  """
  return guest.whole(reshard(x, gathered(dims)))


def gathered(dims: str) -> jax.P | None:
  """Sharding of a parameter after `gather`."""
  return _spec({d: a for d, a in PARAMETER.items() if a != 'data'}, dims)


def over_tokens(function: Callable, replicated: Sequence[int] = ()) -> Callable:
  """`function` run by every device on its own tokens, by `jax.shard_map`.

  Arguments and results have tokens (or batch rows) as their first dimension,
  but for the positions in `replicated`, which every device gets whole and
  marked as varying: their gradients are summed over the devices.
  With no mesh set it is `function` itself.
  """
  if axis_sizes() is None:
    return function

  def on_device(*args):
    args = [
      jax.lax.pcast(a, TOKENS, to='varying') if i in replicated else a
      for i, a in enumerate(args)
    ]
    return function(*args)

  def mapped(*args):
    specs = tuple(
      jax.P() if i in replicated else jax.P(TOKENS) for i in range(len(args))
    )
    return jax.shard_map(on_device, in_specs=specs, out_specs=jax.P(TOKENS))(
      *args
    )

  return mapped


def per_device(
  function: Callable, dims: tuple, out_dims: tuple, is_opaque: bool = False
) -> Callable:
  """`function` of what each device holds, for work that needs no exchange.

  Args:
    function: of arrays, or trees of them; returns a tuple of such.
    dims: letters of each array, in the same trees.
    out_dims: letters of each result.
    is_opaque: it holds a kernel that does not say over which axes its results
      vary. Then no argument with a gradient may be whole on several devices.
  """
  if axis_sizes() is None:
    return function
  specs, out_specs = (jax.tree.map(act, d) for d in (dims, out_dims))
  mapped = jax.shard_map(
    function, in_specs=specs, out_specs=out_specs, check_vma=not is_opaque
  )
  return lambda *args: mapped(*jax.tree.map(reshard, args, specs))


# Up to so many values an initializer draws in one dimension.
_DRAWN_FLAT = 2**20


def sharded(init: Callable, spec: jax.P | None) -> Callable:
  """The initializer `init`, its result placed as `spec` says.

  Its values must not depend on the shape. XLA's CPU takes three to six times as
  long to compile a draw in several dimensions as one in a single one, of the
  same numbers; a large array is drawn as it lies, by each device its own part.
  """

  def sharded_init(key, shape, *args):
    size = math.prod(shape)
    if size > _DRAWN_FLAT:
      return reshard(init(key, shape, *args), spec)
    return reshard(init(key, (size,), *args).reshape(shape), spec)

  return sharded_init


def shards(dim: str) -> tuple[str, int]:
  """The mesh axes that split dimension `dim`, and into how many pieces."""
  lengths = axis_sizes()
  axes = ACTIVATION.get(dim) or PARAMETER.get(dim) or ()
  axes = (axes,) if isinstance(axes, str) else axes
  size = 1 if lengths is None else math.prod(lengths[axis] for axis in axes)
  return ' x '.join(axes), size


def reshard(x: jax.Array, spec: jax.P | None) -> jax.Array:
  """`x` under another sharding; `x` itself without one."""
  if spec is None:
    return x
  if axis_sizes() is None:
    return guest.lay(x, spec)
  return jax.sharding.reshard(x, spec)


def spec_of(x: jax.Array) -> jax.P | None:
  """The sharding of `x`; None where none is to be given, as in `shard_map`."""
  spec = jax.typeof(x).sharding.spec
  return spec if any(spec) else None


def num_token_shards() -> int:
  """Pieces into which a batch is split under the mesh in use."""
  return shards('B')[1]


def abstract(function: Callable, *args, mesh: jax.sharding.Mesh):
  """Shapes, types and shardings on `mesh` of what `function(*args)` returns."""
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(function, *args)

  def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Shapes without a sharding, such as constants, are whole on each device.
    spec = jax.P() if x.sharding is None else x.sharding.spec
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(concrete, shapes)
