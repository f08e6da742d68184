# SPDX-License-Identifier: Apache-2.0
"""attention: sparse against dense at long inputs, composed heads against plain.

'forward' is the attention of one sequence of each of `lengths`: dense in chunks
of queries, and sparse, which reads a window, `kept_blocks` blocks of 64 and
summaries of the others. 'decode' is one token with `context` before it, through
a cache that is written in place. 'train' is a train step of a small model with
one sequence of `train_length`: plain heads, then heads composed by factors of
the queries only, and of queries and keys; all with the same windows and
QK-norm. On a GPU, in 16 bits, cuDNN's flash attention runs beside them; in
'forward' it knows no documents, and in 'decode' it only reads the cache.

On an H200 (results/attention_h200.json, as printed by --heads=16 --chunk=1024
--lengths=8192,32768,131072 --context=131072 --dtype=bfloat16), in ms:

  forward   dense  sparse  cuDNN      decode   dense  sparse
  8,192       3.8     2.1    0.4
  32,768     58.1     9.4    4.9
  131,072   897.8    61.4   74.8      131,072   0.07    0.13

Sparse attention there is made of XLA's gathers and matmuls, whose scores go
through memory; what is published as 9x and 11.6x at 64k is one kernel. A token
is decoded by some 30 short kernels, where dense has one.

On two CPU cores (results/attention_cpu.json) sparse is 2.07x, 3.45x and 6.04x
as fast as dense at 4,096, 8,192 and 16,384, and a token after 16,384 is decoded
11.3x as fast. There a train step with composed heads takes 1.31x the time of
plain ones, by queries only 1.10x. Two more runs on that day gave 1.87x and
2.03x, 3.7x, 6.3x and 6.5x; 9.7x and 13.4x; 1.36x and 1.35x, 1.11x.

Ratios are to the first line of each task. The most blocks are kept: fewer would
take no less time.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxsparse import config as config_lib
from jaxsparse.config import Config
from jaxsparse.config.attention import DCMHAConfig, query_wise_dcmha
from jaxsparse.config.errors import require
from jaxsparse.experiments.bench import measuring, train_step
from jaxsparse.experiments.bench.measuring import Contender
from jaxsparse.ops.attention.dense import attention
from jaxsparse.ops.sparse_attention.sparse_attention import sparse_attention
from jaxsparse.ops.sparse_attention.sparse_cache import (
  append,
  cached_sparse_attention,
  init_sparse_cache,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)

OPTIONS = dict(
  # Lengths of 'forward', with commas between; empty for none.
  lengths='4096,8192,16384',
  # Tokens before the one of 'decode'; 0 for none.
  context=16384,
  # Tokens of a sequence of 'train'; 0 for none.
  train_length=1024,
  heads=8,
  kv_heads=2,
  width=64,
  block=64,
  # Queries that share a choice of blocks, in 'forward'.
  tile=64,
  window_blocks=8,
  kept_blocks=16,
  # Queries at once.
  chunk=512,
  # Of the model of 'train'.
  layers=2,
  model_dim=512,
  # Queries at once there.
  train_chunk=64,
  dtype='float32',
  rounds=5,
)


def measure(options: argparse.Namespace) -> Iterator[dict]:
  _check(options)
  for length in filter(None, options.lengths.split(',')):
    yield from _measure_forward(options, int(length))
  if options.context:
    yield from _measure_decode(options)
  if options.train_length:
    yield from _measure_train(options)


show = measuring.print_last


def _sparse_options(options: argparse.Namespace, tile: int) -> SparseOptions:
  return SparseOptions(
    block=options.block,
    tile=tile,
    window_blocks=options.window_blocks,
    max_blocks=options.kept_blocks,
    chunk=options.chunk,
  )


def _draw(options, length, num_heads, seed):
  shape = (1, length, num_heads, options.width)
  return jax.random.normal(jax.random.key(seed), shape, options.dtype)


def _measure_forward(options, length):
  query = _draw(options, length, options.heads, 0)
  key, value = (_draw(options, length, options.kv_heads, i) for i in (1, 2))
  rows = jnp.arange(length)[None]
  segments = jnp.ones((1, length), jnp.int32)
  coverage = jnp.full((1, length, options.kv_heads), jnp.inf)
  sparse_options = _sparse_options(options, options.tile)

  def dense(query, key, value):
    return attention(
      query, key, value, rows, rows, segments, segments, chunk=options.chunk
    )

  def sparse(query, key, value):
    inputs = SparseInputs(query, key, value, segments, coverage)
    return sparse_attention(inputs, sparse_options)[0]

  functions = dict(dense=dense, sparse=sparse)
  if _has_cudnn(options):
    functions['cuDNN'] = functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation='cudnn'
    )
  contenders = measuring.in_threads(
    lambda function: measuring.compiled(function, query, key, value), functions
  )
  return measuring.compare(f'forward {length:,}', contenders, options.rounds)


def _has_cudnn(options):
  is_narrow = jnp.dtype(options.dtype).itemsize == 2
  return jax.default_backend() == 'gpu' and is_narrow


def _measure_decode(options):
  """A token, whose cache is donated and carried from call to call.

  Both caches hold the rows of a head next to each other, as the model's do.
  """
  context = options.context
  query = _draw(options, 1, options.heads, 0)
  new = [_draw(options, 1, options.kv_heads, i) for i in (1, 2)]
  past = [_draw(options, context + 1, options.kv_heads, i) for i in (3, 4)]
  rows = jnp.arange(context + 1)[None]
  one, segments = jnp.ones((1, 1), jnp.int32), jnp.ones_like(rows)
  sparse_options = _sparse_options(options, 1)

  def dense(cache, query, key, value):
    cache = [
      jax.lax.dynamic_update_slice_in_dim(
        old, jnp.moveaxis(x, 1, 2), context, 2
      )
      for old, x in zip(cache, (key, value), strict=True)
    ]
    by_row = [jnp.moveaxis(x, 2, 1) for x in cache]
    y = attention(query, *by_row, rows[:, -1:], rows, one, segments)
    return cache, y

  coverage = jnp.full((1, 1, options.kv_heads), jnp.inf)

  def sparse(cache, query, key, value):
    inputs = SparseInputs(query, key, value, one, coverage)
    y, cache, _ = cached_sparse_attention(
      inputs, cache, jnp.int32(context), sparse_options
    )
    return cache, y

  empty = init_sparse_cache(
    1, options.kv_heads, context + 1, options.width, sparse_options,
    options.dtype,
  )  # fmt: skip
  inputs = SparseInputs(query, *past, segments, coverage).completed()
  filled = jax.jit(functools.partial(append, options=sparse_options))(
    empty, jnp.int32(0), inputs
  )
  width = options.kv_heads * options.width * query.dtype.itemsize
  blocks = options.window_blocks + 1 + options.kept_blocks
  # Keys and values; of the sparse one also of the summaries, which choose, too.
  least = dict(
    dense=2 * width * context,
    sparse=2 * width * (blocks * options.block + context // options.block),
  )
  contenders = {
    'dense': _carried(
      dense, [jnp.moveaxis(x, 1, 2) for x in past], query, *new
    ),
    'sparse': _carried(sparse, filled, query, *new),
  }
  if _has_cudnn(options):
    flash = functools.partial(
      jax.nn.dot_product_attention, implementation='cudnn'
    )
    least['cuDNN'] = least['dense']
    try:
      contenders['cuDNN'] = measuring.compiled(flash, query, *past)
    except Exception as error:  # Which sizes it takes, only it knows.
      print(f'cuDNN decodes no token here: {str(error).splitlines()[0]}')
  records = measuring.compare(f'decode {context:,}', contenders, options.rounds)
  for record in records:
    num_bytes = least[record['contender']]
    rate = num_bytes / record['seconds']
    record |= dict(
      least_bytes=num_bytes,
      bytes_per_second=rate,
      share_of_copy=rate / measuring.copy_bandwidth(),
    )
  return records


def _carried(function: Callable, state, *args) -> Contender:
  program = jax.jit(function, donate_argnums=0).lower(state, *args).compile()
  kept = [state]

  def run():
    kept[0], y = program(kept[0], *args)
    return y

  temp_bytes = program.memory_analysis().temp_size_in_bytes
  return Contender(run, temp_bytes=temp_bytes)


def _measure_train(options):
  variants = {
    'plain heads': None,
    'query-wise': query_wise_dcmha(),
    'DCMHA': DCMHAConfig(),
  }
  configs = {n: _train_config(options, dcmha) for n, dcmha in variants.items()}
  if _has_cudnn(options):
    plain = configs['plain heads']
    model = dataclasses.replace(plain.model, attention_implementation='cudnn')
    configs['plain heads, cuDNN'] = dataclasses.replace(plain, model=model)
  runs = measuring.in_threads(train_step.Run, configs)
  contenders = {name: run.contender for name, run in runs.items()}
  task = f'train {options.train_length:,}'
  return measuring.compare(task, contenders, options.rounds)


def _train_config(options, dcmha: DCMHAConfig | None) -> Config:
  base = Config(
    model=config_lib.ModelConfig(
      num_layers=options.layers,
      model_dim=options.model_dim,
      num_heads=options.heads,
      num_kv_heads=options.heads,
      head_dim=options.width,
      mlp_dim=options.model_dim * 11 // 4,
      vocab_size=256,
      qk_norm='head',
      attention_pattern=('local', 'global'),
      query_chunk=options.train_chunk,
      dcmha=dcmha,
      dtype=options.dtype,
    )
  )
  data = dataclasses.replace(
    base.data, seq_len=options.train_length, batch_size=1
  )
  return config_lib.validated(dataclasses.replace(base, data=data))


def _check(options):
  for length in filter(None, options.lengths.split(',')):
    require(
      length.isdigit() and int(length) > 0,
      'lengths must be positive numbers with commas between, got '
      f'{options.lengths!r}.',
    )
  for name in ('context', 'train_length'):
    value = getattr(options, name)
    require(value >= 0, f'{name} must be at least 0, got {value}.')
  for name in ('heads', 'kv_heads', 'width', 'chunk', 'rounds', 'tile'):
    value = getattr(options, name)
    require(value > 0, f'{name} must be positive, got {value}.')
