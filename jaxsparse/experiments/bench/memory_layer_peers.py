# SPDX-License-Identifier: Apache-2.0
"""A memory layer as one would first write it, in JAX and in PyTorch.

All m x m cells of every core are scored and kept for the backward pass, all
selected rows are gathered into one array, and autodiff does the rest.
"""

import jax
import jax.numpy as jnp

from jaxsparse.ops.memory.tucker import leading_directions

EPSILON = 1e-5


def naive_forward(params, x, permutation, config, top):
  """The layer written down step by step; E, P and c as in `nn.memory`."""
  m, Q = config.num_selected, config.num_logical_keys
  T = x.shape[1]
  query = jnp.einsum('td,dsk->tsk', x[0], params['query'])
  query /= jnp.sqrt(jnp.mean(query**2, -1, keepdims=True) + EPSILON)
  query *= params['query_scale'][None, None]
  keys = params['keys']
  keys /= jnp.sqrt(jnp.mean(keys**2, -2, keepdims=True) + EPSILON)
  keys *= params['key_scale'][None, None, None, :, None]
  row, column = jnp.einsum('tsk,hsqkr->sthqr', query, keys)
  u, t = leading_directions(jax.lax.stop_gradient(params['cores'].sum(0)))
  i = top(jnp.einsum('thqr,hr->thq', row, u), m)
  j = top(jnp.einsum('thqr,hr->thq', column, t), m)
  row = jnp.take_along_axis(row, i[..., None], axis=2)
  column = jnp.take_along_axis(column, j[..., None], axis=2)
  grid = jnp.einsum('thip,chpq,thjq->thijc', row, params['cores'], column)
  grid = grid.reshape(*grid.shape[:2], m * m, -1)
  cell = top(grid.sum(-1), m)
  scores = jnp.take_along_axis(grid, cell[..., None], axis=2)
  i = jnp.take_along_axis(i, cell // m, axis=2)
  j = jnp.take_along_axis(j, cell % m, axis=2)
  virtual = permutation[i * Q + j].reshape(T, -1)
  block, slot = virtual // config.num_slots, virtual % config.num_slots
  scores = scores.reshape(*slot.shape, -1)
  rows = params['value_table'][slot].reshape(*scores.shape, -1)
  one_hot = jax.nn.one_hot(block, config.expansion)
  pooled = jnp.einsum('tkc,tke,tkcw->tecw', scores, one_hot, rows)
  pooled = pooled.reshape(T, config.expansion, -1)
  return jnp.einsum('tew,ewd->td', pooled, params['output'])[None]


def torch_forward(torch, params, x, permutation, u, t, config):
  m, Q = config.num_selected, config.num_logical_keys
  query = torch.einsum('td,dsk->tsk', x[0], params['query'])
  query = query * (query.square().mean(-1, True) + EPSILON).rsqrt()
  query = query * params['query_scale']
  keys = params['keys']
  keys = keys * (keys.square().mean(-2, True) + EPSILON).rsqrt()
  keys = keys * params['key_scale'][:, None]
  row, column = torch.einsum('tsk,hsqkr->sthqr', query, keys)
  i = torch.einsum('thqr,hr->thq', row, u).topk(m).indices
  j = torch.einsum('thqr,hr->thq', column, t).topk(m).indices
  rank = row.shape[-1]
  row = row.gather(2, i[..., None].expand(-1, -1, -1, rank))
  column = column.gather(2, j[..., None].expand(-1, -1, -1, rank))
  left = torch.einsum('thip,chpq->cthiq', row, params['cores'])
  grid = torch.einsum('cthiq,thjq->cthij', left, column).flatten(3)
  cell = grid.sum(0).topk(m).indices
  scores = grid.gather(3, cell.expand(len(grid), -1, -1, -1))
  i, j = i.gather(2, cell // m), j.gather(2, cell % m)
  virtual = permutation[i * Q + j].flatten(1).long()
  block, slot = virtual // config.num_slots, virtual % config.num_slots
  scores = scores.permute(1, 2, 3, 0).flatten(1, 2)
  rows = params['value_table'][slot].unflatten(2, (scores.shape[2], -1))
  one_hot = torch.nn.functional.one_hot(block, config.expansion).float()
  weights = scores[:, :, None] * one_hot[..., None]
  pooled = torch.einsum('tkec,tkcw->tecw', weights, rows).flatten(2)
  return torch.einsum('tew,ewd->td', pooled, params['output'])[None]
