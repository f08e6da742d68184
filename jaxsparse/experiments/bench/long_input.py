# SPDX-License-Identifier: Apache-2.0
"""long_input: a long text through a history of bounded size, by stretches.

As `generate --prompt_file` reads it: in chunks, with a cache that forgets. With
`workdir` the model of that run reads the validation text of its data, again and
again until there are `tokens`; without, a small untrained one reads noise, and
only time and memory mean something. What must hold is that after the history is
full a token costs the same wherever it stands, that the process's memory
stays, and that a text's nats do not grow with its place.

results/long_input_cpu.json: by `taskset -c 0`, on the model that `train.py
--config=configs/sparse_attention.py:tiny` left in `--workdir`. No stretch takes
longer than the first, memory stays at 682 MB, and text that is read again after
655,360 bytes has the same nats within 0.016.
"""

import argparse
import dataclasses
import pathlib
import resource
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import DataConfig, ModelConfig, SparseAttentionConfig
from jaxsparse.config.errors import require
from jaxsparse.inference import long_input
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.run import checkpoint, run_config, workdir

OPTIONS = dict(
  workdir='',
  tokens=1_000_000,
  # Tokens of a line of the table.
  stretch=32_768,
  # Blocks of history; 0 for as many as fill the length of training.
  history_blocks=0,
)

_TRAINED_LENGTH = 512


def measure(options: argparse.Namespace) -> Iterator[dict]:
  chunk = long_input.CHUNK
  require(
    options.stretch >= chunk and options.tokens > options.stretch,
    f'stretch must be at least {chunk} and below tokens, got '
    f'{options.stretch} and {options.tokens}.',
  )
  load = _of_run if options.workdir else _untrained
  model, params, tokens, length = load(options)
  model = long_input.with_bounded_history(
    model, length, options.history_blocks or None
  )
  list(_read(model, params, tokens[: 2 * chunk + 1], chunk))  # Compiles.
  yield from _read(model, params, tokens, options.stretch)


def _read(model, params, tokens, stretch):
  inputs = (tokens, np.arange(len(tokens), dtype=np.int32), tokens * 0 + 1)
  cache = jax.jit(init_cache, static_argnums=(0, 1, 2))(model, 1, len(tokens))
  chunk = long_input.chunk_size(model)
  stretch = -(-stretch // chunk) * chunk
  for begin in range(0, len(tokens) - stretch, stretch):
    readings, end = [], begin + stretch
    start = time.monotonic()
    # The last token is the target of the one before it.
    part = [x[None, begin : end + 1] for x in inputs]
    _, cache = long_input.read(model, params, part, cache, readings.append)
    seconds = time.monotonic() - start
    yield dict(
      task=f'tokens {begin:,} to {end:,}',
      seconds=seconds,
      tokens_per_second=stretch / seconds,
      nats_per_token=float(np.mean([r.nats_per_token for r in readings])),
      resident_bytes=_resident_bytes(),
    )


def _resident_bytes():
  """What the process has now, or the most it had where that is not known."""
  statm = pathlib.Path('/proc/self/statm')
  if statm.exists():
    return int(statm.read_text().split()[1]) * resource.getpagesize()
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _of_run(options):
  """The model of a workdir, and its validation text until there is enough."""
  # What loads data is not on every machine that measures.
  from jaxsparse.data.corpus import build_corpus
  from jaxsparse.data.tokenizer import load_from_workdir

  folder = workdir.expanded(options.workdir)
  config = run_config.read(folder)
  _, params = checkpoint.load_params(folder)
  # Built where this user keeps corpora, not where the workdir's maker did.
  data = dataclasses.replace(config.data, cache_dir=DataConfig.cache_dir)
  pieces = build_corpus(data).validation
  text = b''.join(piece.text for piece in pieces).decode('utf-8', 'replace')
  once = load_from_workdir(folder).encode(text)
  tokens = np.resize(np.asarray(once, np.int32), options.tokens + 1)
  return config.model, params, tokens, config.data.seq_len


def _untrained(options):
  model = ModelConfig(
    num_layers=3,
    model_dim=96,
    num_kv_heads=4,
    head_dim=24,
    mlp_dim=256,
    vocab_size=257,
    attention_pattern=('sparse',),
    sparse=SparseAttentionConfig(
      block=16, tile=16, window_blocks=2, max_blocks=7, max_fraction=0.22
    ),
  )
  one = jnp.ones((1, 1), jnp.int32)
  params = Transformer(model).init(jax.random.key(0), one, one, one)['params']
  tokens = np.random.default_rng(0).integers(0, 256, options.tokens + 1)
  return model, params, tokens.astype(np.int32), _TRAINED_LENGTH


def show(records: list[dict]) -> None:
  r = records[-1]
  print(
    f'{r["task"]:<34}{r["tokens_per_second"]:>9,.0f} tokens/s'
    f'{r["nats_per_token"]:>9.4f} nats/token'
    f'{r["resident_bytes"] / 1e6:>8,.0f} MB'
  )


def summarize(records: list[dict]) -> None:
  """How the later stretches compare to the first."""
  slowest, worst, largest = (
    max(r[name] for r in records) / records[0][name]
    for name in ('seconds', 'nats_per_token', 'resident_bytes')
  )
  print(
    f'to the first stretch, at most: {slowest:.2f}x time, {worst:.2f}x nats, '
    f'{largest:.2f}x memory'
  )
