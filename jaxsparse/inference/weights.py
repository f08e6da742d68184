# SPDX-License-Identifier: Apache-2.0
"""Weights as serving wants them: placed at once, and in the type they are used.

Training keeps float32 and casts at every step; what is only ever used in the
type of the activations is cast once here, to the same numbers.
"""

import contextlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from etils import epath

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.inference import adapters as adapters_lib
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.quantize import Quantization, quantize
from jaxsparse.nn.parameter import is_quantized
from jaxsparse.nn.transformer import init_params
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.memory.folded_keys import FoldedKeys
from jaxsparse.ops.tables.quantized_table import QuantizedTable
from jaxsparse.ops.tables.row_delta import DeltaTable
from jaxsparse.run import stored, table_leaves

# What a module casts to the type of its input before it is used, by the name of
# the module. Norms, routers and scores of keys are of float32, and tables of
# values have a type of their own.
_CAST = dict(
  embed={'table'},
  attention={'query', 'key', 'value', 'output', 'heads'},
  dcmha={'hidden', 'low_rank', 'gate'},
  sparse={'router_query', 'router_weight', 'router_key'},
  mlp={'gate', 'up', 'down', 'gate_up'},
  shared={'gate', 'up', 'down', 'gate_up'},
  moe={'gate', 'up', 'down'},
  memory={
    'query', 'query_bias', 'query_conv', 'output', 'gate', 'pre_value_map',
  },
)  # fmt: skip


def load(
  workdir: epath.PathLike,
  config: ModelConfig,
  step: int | None = None,
  devices: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] | None = None,
  how: Quantization | None = None,
  tables: str = '',
  adapters: Sequence[epath.PathLike] = (),
  is_forced: bool = False,
  is_folded: bool = False,
) -> tuple[int, dict]:
  """The parameters of a checkpoint, to be used by `config` as it is.

  What is read is compared with what was saved before it is cast.

  Args:
    workdir: of a training run.
    config: of its model, with vocab_size set.
    step: which checkpoint; None takes the newest that is whole.
    devices: the mesh to spread them over, see `mesh.make_mesh`; None for the
      default device.
    say: gets a sentence about each checkpoint that could not be read.
    how: to quantize it; None leaves it as it is stored.
    tables: where those of memory layers are to lie, see
      `checkpoint.load_params`.
    adapters: folders of those to be added, see `inference.adapters`.
    is_forced: add those of another base, too.
    is_folded: for decoding, see `fold`; several devices get them as they are.

  Returns:
    The step and the parameters.

  Raises:
    UserError: there is no such checkpoint, it can't be read, or the mesh can't
      split the model.
  """
  abstract = None
  if devices is not None:
    require(
      tables in ('', 'device'),
      "tables must be 'device' with several devices, which divide them; got "
      f'{tables!r}.',
    )
    abstract = mesh.abstract(
      lambda: init_params(config, jax.random.key(0)), mesh=devices
    )
  step, params = adapters_lib.load_params(
    workdir, step, say, abstract, tables, how
  )
  with jax.set_mesh(devices) if devices else contextlib.nullcontext():
    if how:
      # Those on file are quantized by now.
      params, on_file = _without_tables(params, how.tables)
      params = table_leaves.joined(quantize(config, params, how), on_file)
    if adapters:
      base = stored.params_fingerprint(workdir, step)
      params = adapters_lib.applied(
        config, params, adapters, base, is_forced, tables, say or print
      )
    if is_folded and devices is None:
      params = fold_for_decode(config, params)
    return step, cast(config, params)


def _without_tables(params: dict, kind: str) -> tuple[dict, dict]:
  """Without those that have rows of this kind, and these by their paths."""
  rest, tables = table_leaves.split(params)
  done = {
    path: x
    for path, x in tables.items()
    if isinstance(x, QuantizedTable) and x.kind == kind
  }
  others = {path: x for path, x in tables.items() if path not in done}
  return table_leaves.joined(rest, others), done


def cast(config: ModelConfig, params: dict) -> dict:
  """Parameters that the model turns into the same numbers, and sooner.

  Those that are cast take the place of the given ones, which are gone.
  """
  dtype = jnp.dtype(config.dtype)
  leaves, structure = jax.tree_util.tree_flatten_with_path(
    params,
    is_leaf=lambda x: (
      is_quantized(x) or isinstance(x, AdaptedMatrix | DeltaTable | FoldedKeys)
    ),
  )
  chosen = [
    i
    for i, (path, x) in enumerate(leaves)
    if not is_quantized(x)
    and x.dtype != dtype
    and _is_cast([p.key for p in path])
  ]
  values = [x for _, x in leaves]

  def cast_one(x):
    if isinstance(x, AdaptedMatrix):
      return adapters_lib.cast(x, dtype)
    return x.astype(dtype)

  cast_all = jax.jit(lambda xs: list(map(cast_one, xs)), donate_argnums=0)
  if chosen:
    done = cast_all([values[i] for i in chosen])
    for i, x in zip(chosen, done, strict=True):
      values[i] = x
  return jax.tree.unflatten(structure, values)


def _is_cast(path: list[str]) -> bool:
  if len(path) == 1:
    # The matrix of an untied vocabulary.
    return path == ['output']
  return path[-1] in _CAST.get(path[-2], ())
