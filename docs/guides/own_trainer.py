# SPDX-License-Identifier: Apache-2.0
"""A trainer of one's own: a mesh with other names, tables trained by rows."""

import functools

import jax
import numpy as np
import optax

import jaxsparse

# How this program calls the axes of its mesh, and which of them cut tables.
AXES = jaxsparse.Axes(batch=('replica',), rows=('shard',), columns=())
MODEL = jaxsparse.ModelConfig(
  num_layers=2, model_dim=64, num_heads=4, num_kv_heads=4, head_dim=16,
  mlp_dim=128, vocab_size=256,
  memory=jaxsparse.MemoryConfig(
    num_keys=32, num_selected=8, value_dim=32, placements=((0, 1),)
  ),
)  # fmt: skip


def loss(apply, params, tokens):
  """Nats a token; `apply` stands for `module.apply` and notes what is read."""
  model = jaxsparse.Transformer(MODEL, axes=AXES)
  logits, _, metrics = apply(model, params, tokens[:, :-1])
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  return nats.mean() + metrics['aux_loss']


def make_optimizer(params, rate):
  """row_adam for tables, AdamW for everything else."""
  labels = jax.tree.map_with_path(
    lambda path, _: 'tables' if path[-1].key.endswith('_table') else 'rest',
    params,
  )
  groups = dict(
    tables=jaxsparse.row_adam(rate), rest=optax.adamw(rate, weight_decay=0.0)
  )
  return jaxsparse.partition(groups, labels)


def take_step(optimizer, params, state, tokens):
  value, gradients = jaxsparse.row_value_and_grad(loss)(params, tokens)
  clip = jaxsparse.clip_by_global_norm(1.0)
  gradients, _ = clip.update(gradients, clip.init(params))
  updates, state = optimizer.update(gradients, state, params)
  return jaxsparse.apply_updates(params, updates), state, value


def train(params, batches, rate=3e-3):
  """Trains on the mesh in use; returns the parameters and the losses."""
  optimizer = make_optimizer(params, rate)
  step = jax.jit(functools.partial(take_step, optimizer), donate_argnums=(0, 1))
  state, losses = jax.jit(optimizer.init)(params), []
  for tokens in batches:
    params, state, value = step(params, state, tokens)
    losses.append(float(value))
  # row_adam brings absent rows up to date when they return, or here.
  params, state = jax.jit(optimizer.finalize)(params, state)
  return params, losses


if __name__ == '__main__':
  shards = 2 if jax.device_count() % 2 == 0 else 1
  lengths = (jax.device_count() // shards, shards)
  mesh = jax.make_mesh(lengths, ('replica', 'shard'))
  text = np.fromfile(__file__, np.uint8).astype(np.int32)
  starts = np.random.default_rng(0).integers(0, len(text) - 65, (50, 8))
  batches = [text[start[:, None] + np.arange(65)] for start in starts]
  with jax.set_mesh(mesh):
    init = jaxsparse.Transformer(MODEL, axes=AXES).init
    params = jax.jit(init)(jax.random.key(0), batches[0][:, :-1])['params']
    params, losses = train(params, batches)
  print(f'{losses[0]:.2f} nats a byte at first, {losses[-1]:.2f} at the end')
