# SPDX-License-Identifier: Apache-2.0
"""The MLPs of a mixture's experts, on one device and split over a mesh.

Tokens are split over the mesh axes `data` and `sparse`, experts over `sparse`,
and the inner width of each over `model`. The devices along `sparse` hold one
copy of all experts: each gathers the tokens of all of them, runs its own
experts on those that pass them, and a reduce-scatter adds up each token's parts
at its home. Shapes are static and nothing is dropped: a device has room for all
assignments of the group, but computes its own only.

Letters: T tokens, k experts of a token, X experts, D model width, F inner
width; lower-case t is what one device has of T.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.experts import routing
from jaxsparse.ops.experts.grouped_matmul import assigned_matmul, grouped_matmul
from jaxsparse.ops.kernels import few_experts
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.ops.shard_map_vma import match_vma

# 'up' [X, D, F] and 'down' [X, F, D], and 'gate' [X, D, F] for SwiGLU.
Matrices = Mapping[str, jax.Array | QuantizedMatrix | AdaptedMatrix]


def expert_mlp(
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
  *,
  first_expert: Int[Array, ''] | int | None = None,
  gelu: str = 'tanh',
  implementation: str = 'auto',
  is_steady: bool = False,
) -> Float[Array, 'T D']:
  """Weighted sums over a token's experts of their MLPs, on one device.

  SwiGLU where there is a 'gate', else GELU. With fewer assignments than
  experts, as in decoding, nothing is sorted, nor for more on a GPU, whose
  kernels for few tokens have no use for an order.

  Args:
    x: inputs, in the type of the products.
    weights: of each token's experts.
    experts: their numbers.
    matrices: those of the experts, in any float type, quantized or adapted.
    first_expert: number of the first expert in `matrices`; others count as
      zero. None where all are there.
    gelu: its form, 'tanh' or 'erf'.
    implementation: see `grouped_matmul`.
    is_steady: likewise.

  Returns:
    The sums, in f32 (f64 for f64) and not yet added up over `model`.
  """
  if implementation == 'auto' and first_expert is None:
    inputs = match_vma(x, weights, experts, dict(matrices))
    if not few_experts.unsupported_reason(*inputs, gelu=gelu):
      return _by_kernel(gelu, *inputs)
  return _by_steps(
    x, weights, experts, matrices, first_expert, gelu, implementation, is_steady
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(
  gelu: str,
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
):
  return few_experts.expert_mlp(x, weights, experts, matrices, gelu=gelu)


def _forward(
  gelu: str,
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
):
  """By steps, whose gradient is at hand."""

  def run(
    x: Float[Array, 'T D'], weights: Float[Array, 'T k'], matrices: Matrices
  ):
    return _by_steps(x, weights, experts, matrices, gelu=gelu)

  return jax.vjp(run, x, weights, matrices)


def _backward(gelu: str, pull: Callable, cotangent: Float[Array, 'T D']):
  d_x, d_weights, d_matrices = pull(cotangent)
  return d_x, d_weights, None, d_matrices


_by_kernel.defvjp(_forward, _backward)


def _by_steps(
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
  first_expert: Int[Array, ''] | int | None = None,
  gelu: str = 'tanh',
  implementation: str = 'auto',
  is_steady: bool = False,
):
  num_experts, num_experts_per_token = len(matrices['up']), experts.shape[1]
  is_few = first_expert is None and experts.size < num_experts
  if is_few and implementation == 'auto':
    return few_tokens_mlp(x, weights, experts, matrices, gelu)
  first_expert = 0 if first_expert is None else first_expert
  dispatch = routing.dispatch_order(experts, num_experts, first_expert)

  def product(rows, matrices):
    return grouped_matmul(
      rows,
      matrices,
      dispatch.sizes,
      implementation=implementation,
      is_steady=is_steady,
    )

  rows = routing.to_experts(x, dispatch, num_experts_per_token)
  rows = _mlp(_adapted(product), rows, matrices, gelu)
  return routing.from_experts(rows, weights, dispatch)


def few_tokens_mlp(
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
  gelu: str = 'tanh',
) -> Float[Array, 'T D']:
  """`expert_mlp` without sorting: matrices are read for each assignment."""
  expert = experts.reshape(-1)

  def product(rows, matrices):
    return assigned_matmul(rows, matrices, expert)

  rows = jnp.repeat(x, experts.shape[1], axis=0)
  rows = _mlp(_adapted(product), rows, matrices, gelu)
  return routing.weighted_sum(rows, weights)


def expert_mlp_reference(
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
  gelu: str = 'tanh',
) -> Float[Array, 'T D']:
  """`expert_mlp` by running every expert on every token."""

  def product(rows, matrices):
    return jnp.einsum('...td,xdf->xtf', rows, matrices.astype(x.dtype))

  def down(rows, matrices):
    return jnp.einsum('xtf,xfd->xtd', rows, matrices.astype(x.dtype))

  hidden = product(x, matrices['up'])
  if 'gate' in matrices:
    hidden *= jax.nn.silu(product(x, matrices['gate']))
  else:
    hidden = jax.nn.gelu(hidden, approximate=gelu == 'tanh')
  is_used = jax.nn.one_hot(experts, len(matrices['up']), dtype=bool)
  weights_TX = jnp.where(is_used, weights[..., None], 0).sum(1)
  return jnp.einsum('tx,xtd->td', weights_TX, down(hidden, matrices['down']))


def sharded_expert_mlp(
  x: Float[Array, '*T D'],
  weights: Float[Array, '*T k'],
  experts: Int[Array, '*T k'],
  matrices: Matrices,
  *,
  is_partial: bool = False,
  gelu: str = 'tanh',
  implementation: str = 'auto',
  is_steady: bool = False,
) -> Float[Array, '*T D']:
  """`expert_mlp` of global arrays; with no mesh set it is that very function.

  Behind a guest's door (`mesh.inside`) the same runs on what one device holds,
  whatever axes split the experts and their width.

  Args:
    x: inputs, split over tokens along the first dimension like the weights and
      experts of each.
    weights: of each token's experts.
    experts: their numbers.
    matrices: experts split over `sparse`, F over `model`.
    is_partial: leave the sum over `model` to the caller, see `mesh.partial`.
    gelu: see `expert_mlp`.
    implementation: see `grouped_matmul`.
    is_steady: likewise.

  Returns:
    The sums in the type of `x`, in which parts of several devices are added.
  """
  batch, width, dtype = x.shape[:-1], x.shape[-1], x.dtype

  def flat(x):
    return x.reshape(-1, x.shape[-1])

  def run(x, weights, experts, matrices, first_expert=None):
    return expert_mlp(
      x, weights, experts, matrices,
      first_expert=first_expert, gelu=gelu, implementation=implementation,
      is_steady=is_steady,
    ).astype(dtype)  # fmt: skip

  axes, view = mesh.axis_sizes(), mesh.inside()
  layout = mesh.EXPERT_LAYOUT if axes is not None else mesh.WHOLE
  if view is not None and not view.is_initializing:
    layout, axes = view.experts, view.sizes
  if not layout.rows + layout.columns:
    y = run(flat(x), flat(weights), flat(experts), matrices)
    return y.reshape(*batch, width)

  def split(names):
    return tuple(a for a in names if axes[a] > 1)

  rows, group = split(layout.rows), split(layout.device_group)
  alike = layout.alike_rows + layout.alike_columns

  def on_device(x, weights, experts, matrices):
    local, tokens = x.shape, [flat(x), flat(weights), flat(experts)]
    first_expert = None
    if group:
      tokens = [jax.lax.all_gather(a, group, tiled=True) for a in tokens]
    if rows:
      first_expert = jax.lax.axis_index(rows) * len(matrices['up'])
    y = run(*tokens, matrices, first_expert)
    if group:
      y = jax.lax.psum_scatter(y, group, tiled=True)
    if is_partial and view is None and split(alike):
      y = jax.lax.pcast(y, alike, to='unreduced')
    elif alike:
      y = jax.lax.psum(y, alike)
    return y.reshape(local)

  if view is not None:
    return on_device(x, weights, experts, matrices)
  tokens = jax.P(mesh.TOKENS)
  inner = dict(gate='XDF', up='XDF', down='XFD')
  dims = 'B' + 'T' * (len(batch) - 1) + 'D'
  specs = {
    name: x.specs(mesh.gathered(inner[name]))
    if isinstance(x, QuantizedMatrix | AdaptedMatrix)
    else mesh.gathered(inner[name])
    for name, x in matrices.items()
  }
  return jax.shard_map(
    on_device,
    in_specs=(tokens, tokens, tokens, specs),
    out_specs=mesh.partial(dims) if is_partial else mesh.act(dims),
  )(x, weights, experts, dict(matrices))


def _adapted(product):
  """The product of rows with experts' matrices, of adapted ones too."""

  def adapted(rows, matrices):
    if not isinstance(matrices, AdaptedMatrix):
      return product(rows, matrices)
    low = product(rows, matrices.a)
    y = product(rows, matrices.base)
    return y + (matrices.scale * product(low, matrices.b)).astype(y.dtype)

  return adapted


def _mlp(product, rows, matrices, gelu):
  up = product(rows, matrices['up'])
  if 'gate' in matrices:
    hidden = jax.nn.silu(product(rows, matrices['gate'])) * up
  else:
    hidden = jax.nn.gelu(up, approximate=gelu == 'tanh')
  return product(hidden, matrices['down'])
