"""The mesh and its axes: the only file that names them.

Every array's sharding is looked up letter by letter from the alphabet of
dimensions (B batch, T positions, D model width, N query heads, K key/value
heads, H head width, F feed-forward width, V vocabulary, M slots, W value
width, Q sub-keys, P memory heads). The mesh always has all of its axes, of
length 1 when unused, so that no rule is conditional. With no mesh set every
lookup gives None, and the same code runs on one device.
"""

import math
from collections.abc import Callable, Sequence

import jax

from jaxsparse.errors import UserError

AXES = ('data', 'sparse', 'model')

# The axes over which tokens are split.
TOKENS = ('data', 'sparse')

ACTIVATION = dict(B=TOKENS, N='model', K='model', F='model')
PARAMETER = dict(D='data', N='model', K='model', F='model', M='data')


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


def _spec(rules: dict, dims: str) -> jax.P | None:
  if jax.sharding.get_abstract_mesh().empty:
    return None
  return jax.P(*(rules.get(dim) for dim in dims))


def act(dims: str) -> jax.P | None:
  """Sharding of an activation: act('TF') is P(None, 'model')."""
  return _spec(ACTIVATION, dims)


def param(dims: str) -> jax.P | None:
  """Sharding of a parameter: param('DF') is P('data', 'model')."""
  return _spec(PARAMETER, dims)


def gather(x: jax.Array, dims: str) -> jax.Array:
  """The parameter `x` as it takes part in a computation.

  Parameters are stored spread over `data`; here that axis is gathered, and
  what `model` splits stays split. The gradient is reduce-scattered back.
  """
  compute = {d: a for d, a in PARAMETER.items() if a != 'data'}
  return reshard(x, _spec(compute, dims))


def over_tokens(function: Callable, replicated: Sequence[int] = ()) -> Callable:
  """`function` run by every device on its own tokens, by `jax.shard_map`.

  Arguments and results have tokens (or batch rows) as their first dimension,
  but for the positions in `replicated`, which every device gets whole and
  marked as varying, such that their gradients are summed over the devices.
  With no mesh set it is `function` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
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


def sharded(init: Callable, dims: str) -> Callable:
  """The initializer `init`, its result placed as `param(dims)` says."""

  def sharded_init(*args, **kwargs):
    return reshard(init(*args, **kwargs), param(dims))

  return sharded_init


def shards(dim: str) -> tuple[str, int]:
  """The mesh axes that split dimension `dim`, and into how many pieces."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = ACTIVATION.get(dim) or PARAMETER.get(dim) or ()
  axes = (axes,) if isinstance(axes, str) else axes
  size = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)
  return ' x '.join(axes), size


def reshard(x: jax.Array, spec: jax.P | None) -> jax.Array:
  """`x` under another sharding; `x` itself with no mesh set."""
  return x if spec is None else jax.sharding.reshard(x, spec)


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
