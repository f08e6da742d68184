# SPDX-License-Identifier: Apache-2.0
"""What the decode bench times: many tokens in one program, its cache in place.

The keys and values are one tree and what memory layers keep of earlier inputs
is another, so that models with the same attention can take turns with one cache
of the former.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.experiments.bench.decode_models import noise
from jaxsparse.inference.sampling import Sampling, sample
from jaxsparse.nn.transformer import Cache, Transformer, init_cache

_GREEDY = Sampling(temperature=0.0)


def lower_decode(
  model: ModelConfig,
  params: dict,
  cache: tuple[Cache, Cache],
  tokens: jax.Array,
  context: int,
) -> jax.stages.Lowered:
  """The program of `decode_steps`; its second argument is donated."""
  decode = jax.jit(decode_steps(model, context), donate_argnums=1)
  return decode.lower(params, cache, tokens)


def decode_steps(model: ModelConfig, context: int) -> Callable:
  """A function that decodes all steps, after `context` tokens.

  It takes parameters, a cache in two parts, see `split`, and the tokens to feed
  [steps, B]. It returns the cache, the tokens that it drew [steps, B] and the
  experts or slots that it chose [steps, layers, B, k].
  """

  def decode(params, cache, tokens):
    cache = join(*cache)
    cache['shared']['index'] = jnp.int32(context)

    def step(carry, fed):
      cache, drawn = carry
      # Never negative, but that keeps the order: draw, then feed.
      token = jnp.where(drawn < 0, drawn, fed)[:, None]
      position = jnp.broadcast_to(cache['shared']['index'], token.shape)
      (logits, cache, _), sown = Transformer(model).apply(
        {'params': params},
        token,
        position,
        jnp.ones_like(token),
        cache,
        mutable=['intermediates'],
      )
      drawn = sample(logits[:, -1], jax.random.key(0), _GREEDY)
      return (cache, drawn), (drawn, _picks(sown))

    start = (cache, jnp.zeros_like(tokens[0]))
    (cache, _), (drawn, picks) = jax.lax.scan(step, start, tokens)
    return split(cache), drawn, picks

  return decode


def compile_decode(
  lowered: jax.stages.Lowered, compiler_options: Mapping[str, str | bool] = {}
) -> jax.stages.Compiled:
  """Compiles so that a GPU runs independent kernels at the same time.

  A memory layer's output is needed blocks after its input is there.
  """
  options = dict(compiler_options)
  if jax.default_backend() == 'gpu':
    options['xla_gpu_command_buffer_scheduling_mode'] = 'CONCURRENT'
  return lowered.compile(compiler_options=options)


def _picks(sown):
  """Experts or slots of all layers [layers, B, k], from what they sow."""
  leaves = jax.tree_util.tree_leaves_with_path(sown)
  kept = [
    x[:, 0]
    for path, x in leaves
    if any(f"'{n}'" in jax.tree_util.keystr(path) for n in ('experts', 'slots'))
  ]
  return jnp.stack(kept) if kept else jnp.zeros((0, 1, 1), jnp.int32)


def fill_cache(
  model: ModelConfig, batch_size: int, length: int, keys: Cache | None = None
) -> tuple[Cache, Cache]:
  """A cache full of random keys and values; the memory layers' own apart.

  With `keys`, those of a model with the same attention, only the latter is new.
  """
  empty = jax.eval_shape(lambda: init_cache(model, batch_size, length))
  cache, contexts = split(empty)
  contexts = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), contexts)
  if keys is not None:
    return keys, contexts
  leaves, structure = jax.tree.flatten(cache['blocks'])
  blocks = [noise(x.shape, x.dtype, i, 1.0) for i, x in enumerate(leaves)]
  positions = jnp.arange(length, dtype=jnp.int32)
  places = jnp.stack([positions, jnp.ones_like(positions)])
  shared = dict(
    index=jnp.zeros((), jnp.int32),
    places=jnp.tile(places[None], (batch_size, 1, 1)),
  )
  return dict(shared=shared, blocks=structure.unflatten(blocks)), contexts


def split(cache: Cache) -> tuple[Cache, Cache]:
  """Keys and values, and apart from them what the memory layers keep."""
  attention = {
    name: dict(attention=block['attention'])
    for name, block in cache['blocks'].items()
  }
  contexts = {
    name: block['memory']
    for name, block in cache['blocks'].items()
    if 'memory' in block
  }
  return dict(shared=cache['shared'], blocks=attention), contexts


def join(cache: Cache, contexts: Cache) -> Cache:
  """What `split` took apart, as the model takes it."""
  blocks = {
    name: block | (dict(memory=contexts[name]) if name in contexts else {})
    for name, block in cache['blocks'].items()
  }
  return dict(shared=dict(cache['shared']), blocks=blocks)


def draw_tokens(
  routing: str, num_steps: int, batch_size: int, vocab_size: int
) -> jax.Array:
  """Tokens to feed, int32 [num_steps, batch_size]."""
  weights = np.ones(vocab_size)
  if routing == 'zipf':
    weights /= np.arange(1, vocab_size + 1)
  rng = np.random.default_rng(0)
  tokens = rng.choice(
    vocab_size, (num_steps, batch_size), p=weights / weights.sum()
  )
  return jnp.asarray(tokens, jnp.int32)
