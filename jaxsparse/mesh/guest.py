# SPDX-License-Identifier: Apache-2.0
"""The mesh of a caller, whatever its axes are called and of whatever type.

A layer runs there as plain code of what one device holds, inside one
`jax.shard_map` over the axes that are still free (`jaxsparse.nn.door`). This
file says what is free, how arrays lie, and, while such code is traced, along
which axes devices hold other tokens and other parts of a table.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxsparse.mesh.layout import WHOLE, TableLayout

_EXPLICIT = jax.sharding.AxisType.Explicit
_MANUAL = jax.sharding.AxisType.Manual

# One entry of a `jax.P`: the axes of one dimension.
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
  """Names of the caller's mesh axes, for a layer that is to use them.

  Axes of type Explicit need no mention: how arrays lie is read off them. Over
  axes of type Auto it can't be seen, so it is what is said here. Those of type
  Manual, of a caller's `jax.shard_map` or `jax.pmap`, are left alone. A name
  that the mesh lacks counts as an axis of length 1, and so does one that does
  not divide its dimension.

  Attributes:
    batch: axes that split the first dimension of the inputs.
    rows: axes that split a table's rows, or a mixture's experts.
    columns: axes that split a table's columns, or the width of experts.
    inside: Manual axes count, too: inside a caller's `jax.shard_map` tokens
      differ along `batch`, and tables and experts come already cut along `rows`
      and `columns`. Parameters are drawn outside, by the layer without it.
  """

  batch: Names = ('data', 'sparse')
  rows: Names = ()
  columns: Names = ('model',)
  inside: bool = False


DEFAULT_AXES = Axes()


@dataclasses.dataclass(frozen=True)
class Inside:
  """What a layer's plain code is part of while it is traced behind the door.

  Attributes:
    tokens: mesh axes along which devices hold tokens of their own.
    tables: how value tables are cut, of which a device holds a part.
    experts: how the experts [X, D, F] are, over X and F.
    sizes: length of each mesh axis.
    is_initializing: all is whole still; the cuts say how parameters are placed.
  """

  tokens: Names = ()
  tables: TableLayout = WHOLE
  experts: TableLayout = WHOLE
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  is_initializing: bool = False

  def pieces(self, axes: Names) -> int:
    return math.prod(self.sizes[a] for a in axes)


# Only the door sets it, around the trace of a layer's code. It follows from the
# mesh, the arrays' types and the module, by which jit keeps its programs.
_INSIDE: contextvars.ContextVar[Inside | None] = contextvars.ContextVar(
  'inside', default=None
)


def inside() -> Inside | None:
  """What the code that is being traced is part of; None outside of any door."""
  return _INSIDE.get()


@contextlib.contextmanager
def behind_the_door(view: Inside) -> Iterator[None]:
  token = _INSIDE.set(view)
  try:
    yield
  finally:
    _INSIDE.reset(token)


def axis_types() -> dict[str, jax.sharding.AxisType]:
  """Types of the axes of the mesh in use; none with no mesh set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def free_axes() -> dict[str, int]:
  """Lengths of the axes of the mesh in use that no caller maps over."""
  mesh, types = jax.sharding.get_abstract_mesh(), axis_types()
  return {a: mesh.shape[a] for a, kind in types.items() if kind != _MANUAL}


def manual_axes() -> dict[str, int]:
  """Lengths of those over which a caller does."""
  mesh, types = jax.sharding.get_abstract_mesh(), axis_types()
  return {a: mesh.shape[a] for a, kind in types.items() if kind == _MANUAL}


def entries(x: Any) -> tuple[Names, ...]:
  """The axes over which each dimension of `x` is known to be split."""
  return tuple(map(_names, jax.typeof(x).sharding.spec.partitions))


def _names(entry: str | Names | None) -> Names:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def lay(x: jax.Array, spec: jax.P) -> jax.Array:
  """`x` laid on the mesh in use as `spec` says, whatever its axes' types.

  Explicit axes by `reshard`, Auto ones by a constraint; there is one of these
  for the axes that `spec` names only.
  """
  types = axis_types()
  if not isinstance(x, jax.core.Tracer) and _MANUAL not in types.values():
    # Outside of jit it may lie on one device still.
    return jax.device_put(x, spec)

  def only(is_kept: Callable[[str], bool]) -> jax.P:
    kept = (tuple(a for a in _names(e) if is_kept(a)) for e in spec)
    return jax.P(*(names or None for names in kept))

  if _EXPLICIT in types.values():
    x = jax.sharding.reshard(x, only(lambda a: types[a] == _EXPLICIT))
  automatic = only(lambda a: types[a] != _EXPLICIT)
  if any(automatic):
    x = jax.lax.with_sharding_constraint(x, automatic)
  return x


def over_free_axes(
  function: Callable, in_specs: tuple, out_specs: Any, check_vma: bool = True
) -> Callable:
  """`function` of each device's parts, by `jax.shard_map` over the free axes.

  Args:
    function: of arrays, or trees of them.
    in_specs: of each argument, which is laid so; a spec may stand for a tree.
    out_specs: of the result.
    check_vma: whether JAX checks what is alike on all devices.
  """
  # Only where a caller maps over others: under `jax.vmap` an axis may be gone
  # that the mesh still lists.
  nested = dict(axis_names=set(free_axes())) if manual_axes() else {}
  mapped = jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=check_vma,
    **nested,
  )

  def lay_below(spec: jax.P, below: Any) -> Any:
    return jax.tree.map(lambda x: lay(x, spec), below)

  def run(*args):
    return mapped(
      *jax.tree.map(
        lay_below, in_specs, args, is_leaf=lambda x: isinstance(x, jax.P)
      )
    )

  return run


def split(
  seen: Sequence[Names],
  declared: Mapping[int, Names],
  shape: Sequence[int],
) -> tuple[Names, ...]:
  """Axes over which the dimensions of an array are, or are to be, split.

  Args:
    seen: what `entries` knows of them.
    declared: axes of a dimension that are Auto, and so can't be seen; one that
      does not divide it is left out.
    shape: of the array.
  """
  types, lengths = axis_types(), free_axes()
  found = [tuple(a for a in names if lengths.get(a, 1) > 1) for names in seen]
  used = {a for names in found for a in names}
  for dim, names in declared.items():
    for a in names:
      is_hidden = types.get(a) not in (None, _EXPLICIT, _MANUAL)
      if not is_hidden or a in used or lengths[a] == 1:
        continue
      pieces = math.prod(lengths[b] for b in (*found[dim], a))
      if shape[dim] % pieces == 0:
        found[dim] += (a,)
        used.add(a)
  return tuple(found)


def dividing(axes: Names, size: int) -> Names:
  """The first of the axes that together divide a dimension."""
  lengths, kept, pieces = free_axes(), (), 1
  for a in axes:
    pieces *= lengths[a]
    if size % pieces:
      break
    kept += (a,)
  return kept


def part(dims: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Of a parameter's shape what one device holds behind the door.

  Args:
    dims: its letters, of which M and W may be cut, the rows and columns of
      tables, and X and F, the experts and their width.
    shape: of the whole.
  """
  view = inside()
  if view is None or view.is_initializing:
    return shape
  cuts = _cuts(view)
  return tuple(
    size // view.pieces(cuts.get(dim, ()))
    for dim, size in zip(dims, shape, strict=True)
  )


def placement(dims: str) -> jax.P | None:
  """Sharding of a new parameter on a guest's mesh; None outside of `init`."""
  view = inside()
  if view is None or not view.is_initializing:
    return None
  cuts = _cuts(view)
  return jax.P(*(cuts.get(dim) or None for dim in dims))


def whole(x: jax.Array) -> jax.Array:
  """A parameter that has just been placed, for the code that drew it."""
  view = inside()
  return lay(x, jax.P()) if view and view.is_initializing else x


def _cuts(view: Inside) -> dict[str, Names]:
  return dict(
    M=view.tables.rows,
    W=view.tables.columns,
    X=view.experts.rows,
    F=view.experts.columns,
  )


def total(x: jax.Array) -> jax.Array:
  """A sum over tokens of one device, as that over the tokens of all."""
  view = inside()
  return jax.lax.psum(x, view.tokens) if view and view.tokens else x


def least(x: jax.Array) -> jax.Array:
  """The least of one device's tokens, as that of all."""
  return -most(-x)


def most(x: jax.Array) -> jax.Array:
  """The most of one device's tokens, as that of all; without a gradient."""
  view = inside()
  if not (view and view.tokens):
    return x
  return jax.lax.pmax(jax.lax.stop_gradient(x), view.tokens)


def mean(x: jax.Array) -> jax.Array:
  """A mean over tokens of one device, as that over the tokens of all."""
  view = inside()
  return jax.lax.pmean(x, view.tokens) if view and view.tokens else x
