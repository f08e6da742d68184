# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in place of a block's MLP.

Every token passes k of X MLPs, chosen by a router, and adds up their outputs by
the router's weights (Switch Transformer, arXiv:2101.03961; Mixtral,
arXiv:2401.04088), and shared experts that all tokens pass (DeepSeekMoE,
arXiv:2401.06066). No token is dropped.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.config.model import MoEConfig
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import MLP, Metrics, weight
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.parameter import parameter, stored
from jaxsparse.ops.experts import routing
from jaxsparse.ops.experts.expert_mlp import sharded_expert_mlp
from jaxsparse.ops.memory import usage


class MoE(nn.Module):
  """The mixture, with the interface of `MLP`.

  Attributes:
    config: sizes and variants.
    kind: of each expert's MLP, as `MLP` has it.
    num_layers: blocks of the model, for the initial values.
    dtype: type of the activations, by default that of the input; the router
      computes in f32 at least.
    is_partial: leave the output's sum over the mesh axis `model` to the caller,
      see `mesh.partial`.
    skips_padding: padding passes no routed expert, and is read no matrix for.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`;
      experts are rows, and their width is columns.
  """

  config: MoEConfig
  kind: str = 'swiglu'
  num_layers: int = 1
  dtype: jax.typing.DTypeLike | None = None
  is_partial: bool = False
  skips_padding: bool = False
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(mixes_positions=lambda layer: False)
  def __call__(
    self,
    x: Num[Array, '*S D'],
    segment_ids: Int[Array, '*S'] | None = None,
  ) -> tuple[Float[Array, '*S D'], Metrics]:
    """Runs the experts.

    Args:
      x: input of each position.
      segment_ids: 0 for padding, which counts neither in the losses nor in the
        load; by default there is none.

    Returns:
      The output, and scalars over the whole batch: 'aux_loss', already
      weighted; 'usage_fraction', the fraction of experts with a token;
      'usage_kl', the KL divergence of their load from a uniform one, in nats;
      'usage_max', the largest load in units of the mean; 'router_entropy' of a
      token's scores in nats.

    Raises:
      UserError: the mesh can't split the experts, or their width, evenly; `x`
        holds integers.
    """
    config = self.config
    lead = Leading.of(x)
    x, segment_ids = lead.flat(x), lead.flat(segment_ids, 'segment_ids')
    _check_split(config)
    model_dim = x.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    router = weight(
      self,
      'router',
      'D.',
      (model_dim, config.num_experts),
      1 / model_dim,
      wide,
    )
    logits = jnp.einsum(
      'btd,dx->btx',
      x.astype(wide),
      router,
      precision=jax.lax.Precision.HIGHEST,
    )
    bias = None
    if config.bias_update_rate > 0:
      init = mesh.sharded(nn.initializers.zeros, mesh.param('.'))
      bias = self.param('router_bias', init, (config.num_experts,))
    is_token = None if segment_ids is None else segment_ids > 0
    weights, experts, load = _route(logits, bias, is_token, config)
    self.sow('intermediates', 'experts', lead.restored(experts))
    if self.skips_padding and is_token is not None:
      weights, experts = (
        jnp.where(is_token[..., None], array, none)
        for array, none in ((weights, 0), (experts, config.num_experts))
      )
    x = x if self.dtype is None else x.astype(self.dtype)
    y = sharded_expert_mlp(
      x,
      weights,
      experts,
      self._matrices(model_dim),
      is_partial=self.is_partial,
      # Of one token each: what a sequence gets must not hang on the others.
      is_steady=self.skips_padding and x.shape[1] == 1,
      gelu='erf' if self.kind == 'gelu_erf' else 'tanh',
    )
    if config.num_shared:
      y += self._shared(x)
    metrics = _metrics(logits, bias, load, is_token, config)
    return lead.restored(y), lead.metrics(metrics)

  def _matrices(self, model_dim):
    """Matrices of all experts, as they are stored: f32, or less for serving.

    They are cast where they are used, so that only those in use are; so are
    quantized ones turned into numbers.
    """
    num_experts, width = self.config.num_experts, self.config.expert_dim

    def declare(name, dims, shape, variance):
      init = nn.initializers.normal(variance**0.5)
      init = mesh.sharded(init, mesh.param(dims))
      shape = mesh.part(dims, (num_experts, *shape))
      return stored(parameter(self, name, init, shape), dims)

    variance = 1 / (2 * self.num_layers * width)
    matrices = dict(
      up=declare('up', 'XDF', (model_dim, width), 1 / model_dim),
      down=declare('down', 'XFD', (width, model_dim), variance),
    )
    if self.kind == 'swiglu':
      gate = declare('gate', 'XDF', (model_dim, width), 1 / model_dim)
      matrices['gate'] = gate
    return matrices

  def _shared(self, x):
    """The experts that all tokens pass: together one wider MLP."""
    width = self.config.num_shared * self.config.expert_dim
    shared = MLP(
      width, self.kind, self.num_layers, self.dtype, self.is_partial,
      name='shared',
    )  # fmt: skip
    return shared(x)[0]


def _route(logits, bias, is_token, config):
  """Weights and experts [B, T, k], and the load [X] of the whole batch."""

  def on_device(logits, bias, is_token):
    weights, experts = routing.route(
      logits.reshape(-1, config.num_experts),
      config.num_experts_per_token,
      kind=config.router,
      normalize=config.normalize_weights,
      bias=bias,
    )
    if is_token is not None:
      is_token = jnp.broadcast_to(is_token.reshape(-1, 1), experts.shape)
    load = usage.count_uses(experts, config.num_experts, is_token)
    shape = (*logits.shape[:-1], config.num_experts_per_token)
    return weights.reshape(shape), experts.reshape(shape), load[None]

  weights, experts, load = mesh.over_tokens(on_device, (1,))(
    logits, bias, is_token
  )
  return weights, experts, mesh.total(load.sum(0))


def _metrics(logits, bias, load, is_token, config):
  """Scalars of one pass; means and loads are over all tokens of all devices."""
  shares = routing.shares_of_scores(logits, config.router)
  aux_loss = config.balance_loss_weight * routing.load_balance_loss(
    shares, load, is_token
  )
  aux_loss += config.router_z_loss_weight * routing.router_z_loss(
    logits, is_token
  )
  if bias is not None:
    aux_loss += routing.bias_balance_term(mesh.gather(bias, '.'), load)
  entropy = -jax.scipy.special.xlogy(shares, shares).sum(-1, keepdims=True)
  entropy = usage.mean_over_tokens(entropy, is_token)[0]
  return {
    'aux_loss': aux_loss,
    'usage_fraction': usage.usage_fraction(load),
    'usage_kl': usage.usage_kl(load),
    'usage_max': routing.load_shares(load).max() * config.num_experts,
    'router_entropy': jax.lax.stop_gradient(entropy),
  }


def _check_split(config):
  for name, size, dim in (
    ('num_experts', config.num_experts, 'X'),
    ('expert_dim', config.expert_dim, 'F'),
  ):
    axes, num_shards = mesh.shards(dim)
    if size % num_shards:
      raise UserError(
        f'{name} must be a multiple of {num_shards}, the size of the mesh '
        f'along {axes}; got {size}.'
      )
