# SPDX-License-Identifier: Apache-2.0
"""The door between a layer and the program of whoever has borrowed it.

Inside, a layer is plain code of what one device holds, with collectives by axis
name where a table is cut. The door is one `jax.shard_map` over the axes of the
caller's mesh that are still free, or nothing:

- with no mesh set, with Manual axes only (`jax.pmap`, a caller's
  `jax.shard_map`) or on our own mesh, whose rules the layers follow themselves,
  the layer is called as it is;
- else tokens come in as they lie over Explicit axes, and split over
  `Axes.batch` where these are Auto; tables and experts are cut as they lie, or
  over `Axes.rows` and `Axes.columns`; everything else is whole on each device.
  The output lies as the input lay.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import subtract_filters

from jaxsparse import mesh
from jaxsparse.config.errors import require, shown
from jaxsparse.mesh import guest
from jaxsparse.mesh.guest import Inside, Names
from jaxsparse.mesh.layout import TableLayout
from jaxsparse.nn.parameter import Parameter, is_quantized
from jaxsparse.ops.tables.row_delta import DeltaTable

# Which dimensions of a parameter are rows (or experts) and columns.
_TABLES = dict(value_table=(0, 1), pre_value_table=(0, 1))
_EXPERTS = dict(up=(0, 2), gate=(0, 2), down=(0, 1))


def portable(
  returns: tuple[str, ...] = ('tokens', 'alike'),
  *,
  whole: tuple[str, ...] = (),
  has_width: bool = True,
  mixes_positions: Callable[[nn.Module], bool] = lambda module: True,
  takes_any_batch: bool = True,
) -> Callable:
  """Makes a compact method of tokens one that runs on any mesh.

  The module has an attribute `axes`, a `mesh.Axes`.

  Args:
    returns: what the method's results are, one by one: 'tokens', arrays that
      begin with the leading dimensions of its first argument; 'alike', a tree
      that is the same for all tokens, as metrics over all of them are; 'cache',
      a tree like the argument `cache`.
    whole: arguments that are the same for all tokens. The others are trees of
      arrays that begin with the leading dimensions of the first; in `cache`
      with its batch, and `tables` are known by their names.
    has_width: whether the first argument's last dimension leads no tokens.
    mixes_positions: whether a position reads others: then a device has whole
      sequences.
    takes_any_batch: whether, on our own mesh, sequences that it can't split
      are computed by every device instead of refused.
  """

  def decorate(method: Callable) -> Callable:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(module, *args, **kwargs):
      bound = signature.bind(module, *args, **kwargs).arguments
      _, *given = bound.items()
      # NumPy's know nothing of meshes, and `+=` would change the caller's.
      arguments = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in given
      }
      first = given[0][0]
      x = arguments[first]
      require(hasattr(x, 'ndim'), f'{first} must be an array, got {shown(x)}.')
      door = _Door(
        module,
        arguments,
        x,
        num_leading=x.ndim - has_width,
        returns=returns,
        whole=whole,
        mixes_positions=mixes_positions(module),
        takes_any_batch=takes_any_batch,
      )
      with door.mesh():
        if not door.is_needed():
          return method(module, **arguments)
        if module.is_initializing():
          return door.initialize(method)
        return door.run(method)

    return call

  return decorate


@dataclasses.dataclass(frozen=True)
class _Door:
  """One call of a module's method under the mesh in use."""

  module: nn.Module
  # By their names; the first is `x`.
  arguments: dict[str, Any]
  x: Any
  num_leading: int
  returns: tuple[str, ...]
  whole: tuple[str, ...]
  mixes_positions: bool
  takes_any_batch: bool

  @property
  def axes(self) -> mesh.Axes:
    return self.module.axes

  def mesh(self) -> contextlib.AbstractContextManager:
    """Enters the mesh on which the tokens were placed, where none is set."""
    own = jax.typeof(self.x).sharding.mesh
    if own.empty or not jax.sharding.get_abstract_mesh().empty:
      return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(own)

  def is_needed(self) -> bool:
    if mesh.inside() is not None or self.num_leading < 0:
      return False
    if mesh.axis_sizes() is not None:
      # Our own mesh, unless it can't split the sequences.
      if not self.takes_any_batch:
        return False
      num_sequences = self.x.shape[0] if self.num_leading > 1 else 1
      is_split = num_sequences % mesh.num_token_shards() == 0
      return not (is_split or 0 in self.x.shape[: self.num_leading])
    return bool(guest.free_axes() or (self.axes.inside and guest.manual_axes()))

  def initialize(self, method: Callable) -> Any:
    """Calls the method with all that is whole, and places its parameters."""
    axes, lengths = self.axes, guest.free_axes()
    # One of length 1 cuts nothing, and rows of what is said to lie over it
    # could not be read without saying how these lie.
    cut = TableLayout(
      *(
        tuple(a for a in names if lengths.get(a, 1) > 1)
        for names in (axes.rows, axes.columns)
      ),
      tokens=(),
    )
    view = Inside(tables=cut, experts=cut, sizes=lengths, is_initializing=True)
    arguments = {
      name: value
      if _is_static(value)
      else jax.tree.map(lambda a: guest.lay(a, jax.P()), value)
      for name, value in self.arguments.items()
    }
    with guest.behind_the_door(view):
      results = method(self.module, **arguments)
    return self._as_they_lay(results)

  def run(self, method: Callable) -> Any:
    """Calls the method for what each device holds."""
    module, variables = self.module, dict(self.module.variables)
    tokens = self._split_of_tokens()
    home = tuple(a for names in tokens for a in names)
    held = dict(variables.get('params', {}))
    held |= self.arguments.get('tables') or {}
    tables, experts = (
      _split_of_tables(held, kinds, self.axes) for kinds in (_TABLES, _EXPERTS)
    )
    view = self._inside(home, tables, experts)
    lengths = guest.free_axes()
    if not lengths:
      with guest.behind_the_door(view):
        return method(module, **self.arguments)

    by_token = jax.P(*(names or None for names in tokens))
    specs_of = functools.partial(
      _specs_of_parameters, tables=tables, experts=experts
    )
    specs = {
      name: specs_of(tree) if name == 'params' else by_token
      for name, tree in variables.items()
    }
    static, arrays, array_specs = {}, {}, {}
    for name, value in self.arguments.items():
      if _is_static(value):
        static[name] = value
        continue
      arrays[name] = value
      if name == 'tables':
        array_specs[name] = specs_of(value)
      elif name in self.whole:
        array_specs[name] = jax.tree.map(lambda a: jax.P(), value)
      elif name == 'cache':
        array_specs[name] = jax.tree.map(
          lambda a: self._spec_of_cache(a, tokens), value
        )
      else:
        array_specs[name] = jax.tree.map(lambda a: _first(by_token, a), value)
    keys = {
      name: module.make_rng(name)
      for name in module.scope.rngs
      if name != 'params'
    }
    mutable = subtract_filters(module.scope.mutable, ['params']) or []
    inner = module.clone(parent=None, name=None)

    def on_device(variables, arrays, keys):
      with guest.behind_the_door(view):
        own_keys = {name: _own_key(key, home) for name, key in keys.items()}
        results, changed = inner.apply(
          variables, **arrays, **static, rngs=own_keys, mutable=mutable
        )
      return results, dict(changed)

    results_specs = tuple(
      dict(
        tokens=by_token, alike=jax.P(), cache=array_specs.get('cache', jax.P())
      )[kind]
      for kind in self.returns
    )
    in_specs = (specs, array_specs, jax.tree.map(lambda _: jax.P(), keys))
    run = guest.over_free_axes(
      # JAX 0.10 can't lower the gradient of what is nested in another's map
      # but for its inputs.
      jax.checkpoint(on_device) if guest.manual_axes() else on_device,
      in_specs,
      (results_specs, by_token),
    )
    results, changed = run(variables, arrays, keys)
    for collection, tree in changed.items():
      for name, value in tree.items():
        module.scope.put_variable(collection, name, value)
    return self._as_they_lay(results)

  def _split_of_tokens(self) -> tuple[Names, ...]:
    """The axes over which each leading dimension is split behind the door."""
    n, axes = self.num_leading, self.axes
    if 'cache' in self.arguments and n != 2:
      # Its batch is of all leading dimensions but the last.
      return ((),) * n
    seen = guest.entries(self.x)[:n]
    declared = {0: axes.batch} if n > self.mixes_positions else {}
    found = guest.split(seen, declared, self.x.shape[:n])
    if self.mixes_positions and n:
      found = (*found[:-1], ())
    return found

  def _inside(self, home, tables, experts) -> Inside:
    axes, manual = self.axes, guest.manual_axes()

    def mapped(names: Names) -> Names:
      if not axes.inside:
        return ()
      return tuple(a for a in names if manual.get(a, 1) > 1)

    def layout(rows: Names, columns: Names) -> TableLayout:
      return TableLayout(
        mapped(axes.rows) + rows,
        mapped(axes.columns) + columns,
        mapped(axes.batch) + home,
      )

    return Inside(
      tokens=mapped(axes.batch) + home,
      tables=layout(*tables),
      experts=layout(*experts),
      sizes=manual | guest.free_axes(),
    )

  def _spec_of_cache(self, x: jax.Array, tokens: tuple[Names, ...]) -> jax.P:
    is_batch = x.ndim > 0 and x.shape[0] == self.x.shape[0]
    return jax.P(tokens[0] or None) if tokens and is_batch else jax.P()

  def _as_they_lay(self, results: Any) -> Any:
    """Results of tokens laid as the tokens lay that came in."""
    spec, n = jax.typeof(self.x).sharding.spec, self.num_leading
    if not any(spec):
      return results

    def laid(y: jax.Array) -> jax.Array:
      is_like = y.shape == self.x.shape
      return guest.lay(y, spec if is_like else jax.P(*spec[:n]))

    def each(kind: str, result: Any) -> Any:
      return jax.tree.map(laid, result) if kind == 'tokens' else result

    return tuple(map(each, self.returns, results))


def _own_key(key: jax.Array, home: Names) -> jax.Array:
  for axis in home:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
  return key


def _is_static(value: Any) -> bool:
  return value is None or isinstance(value, bool | int | float | str)


def _first(by_token: jax.P, x: jax.Array) -> jax.P:
  return jax.P(*by_token[: x.ndim])


def _dims(layer: Mapping, name: str, kinds: Mapping) -> tuple[int, int] | None:
  """Which dimensions of a layer's parameter may be cut."""
  if kinds is _EXPERTS and not (layer.keys() >= {'up', 'down', 'router'}):
    return None  # An MLP, or another layer with a gate.
  return kinds.get(name)


def _has_parts(x: Parameter) -> bool:
  """Whether several arrays stand for one."""
  return is_quantized(x) or isinstance(x, DeltaTable)


def _layers(params: Mapping) -> Iterator[Mapping]:
  """The modules that have parameters of their own."""
  yield params
  for below in params.values():
    if isinstance(below, Mapping):
      yield from _layers(below)


def _split_of_tables(
  params: Mapping, kinds: Mapping, axes: mesh.Axes
) -> tuple[Names, Names]:
  """The free axes that split rows and columns of all parameters of `kinds`."""
  seen, sizes = None, [0, 0]
  for layer in _layers(params):
    for name, x in layer.items():
      if dims := _dims(layer, name, kinds):
        split = x.entries if _has_parts(x) else guest.entries(x)
        units = x.units if _has_parts(x) else x.shape
        seen = [split[d] for d in dims] if seen is None else seen
        sizes = [math.gcd(sizes[i], units[d]) for i, d in enumerate(dims)]
  if seen is None:
    return (), ()
  found = guest.split(seen, {0: axes.rows, 1: axes.columns}, sizes)
  return tuple(map(guest.dividing, found, sizes))


def _specs_of_parameters(params: Any, *, tables: tuple, experts: tuple) -> Any:
  """Sharding of each parameter behind the door."""

  def spec(name: str, x: Parameter) -> Any:
    for kinds, split in ((_TABLES, tables), (_EXPERTS, experts)):
      if dims := _dims(params, name, kinds):
        of_dim = dict(zip(dims, split, strict=True))
        found = jax.P(*(of_dim.get(i) or None for i in range(x.ndim)))
        return x.specs(found) if _has_parts(x) else found
    return jax.P()

  return {
    name: _specs_of_parameters(x, tables=tables, experts=experts)
    if isinstance(x, Mapping)
    else spec(name, x)
    for name, x in params.items()
  }
