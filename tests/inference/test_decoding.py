# SPDX-License-Identifier: Apache-2.0
"""Generation against a loop that recomputes everything; seeds; padding."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import draw_params

from jaxsparse import mesh
from jaxsparse.config import (
  MemoryConfig,
  ModelConfig,
  SparseAttentionConfig,
  TableConfig,
)
from jaxsparse.config.errors import UserError
from jaxsparse.inference import batch_rows, long_input
from jaxsparse.inference.decoding import (
  decode_step,
  generate_tokens,
  left_pad,
)
from jaxsparse.inference.sampling import Sampling
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.training.losses import token_losses

CONFIG = ModelConfig(
  num_layers=2,
  model_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=16,
  vocab_size=19,
  memory=MemoryConfig(
    num_keys=8,
    key_dim=4,
    num_selected=4,
    value_dim=8,
    table=TableConfig(dtype='bfloat16'),
    query_conv_taps=3,
    placements=((0, 1),),
  ),
)
# What runs once need not be compiled well.
QUICKLY = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
PROMPTS = [[5, 1, 7, 7, 2, 0, 3], [8, 4, 9, 2]]
# With the tokens that are drawn.
LENGTH = 13
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope='module')
def params():
  # So large that the likeliest token hangs on what is read.
  return draw_params(CONFIG, deviation=0.3)


def generate(params, prompts=PROMPTS, max_tokens=6, sampling=None, seed=0):
  tokens = generate_tokens(
    CONFIG, params, prompts, max_tokens, sampling or Sampling(), seed
  )
  return np.stack(list(tokens), axis=1)


@pytest.fixture(scope='module')
def forward(params):
  """(tokens, positions and segment_ids [2, T]) -> logits [2, LENGTH, V]."""
  apply = jax.jit(Transformer(CONFIG).apply, compiler_options=QUICKLY)

  def padded(inputs):
    more = [(0, 0), (0, LENGTH - inputs[0].shape[1])]
    logits, _, _ = apply({'params': params}, *(np.pad(x, more) for x in inputs))
    return np.asarray(logits)

  return padded


def test_greedy_generation_of_a_ragged_batch(params, forward):
  """Each token is the likeliest one by the full forward of all before it."""
  drawn = generate(params, sampling=GREEDY).tolist()
  inputs = np.zeros((3, 2, LENGTH), np.int32)
  for i, (row, prompt) in enumerate(zip(drawn, PROMPTS, strict=True)):
    length = len(prompt) + len(row)
    inputs[:, i, :length] = prompt + row, range(length), np.ones(length)
  best = forward(tuple(inputs)).argmax(-1).tolist()
  for row, prompt, of_row in zip(drawn, PROMPTS, best, strict=True):
    assert of_row[len(prompt) - 1 :][: len(row)] == row


SPARSE = dataclasses.replace(
  CONFIG,
  num_layers=1,
  memory=None,
  attention_pattern=('sparse',),
  sparse=SparseAttentionConfig(
    block=4, tile=2, window_blocks=1, max_blocks=2, coverage_logit=0.0
  ),
)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [None, (2, 2, 1)])
def test_sparse_attention_reads_each_of_a_ragged_batch_as_alone(
  shape, monkeypatch
):
  """Padding does not move a prompt on the grid of blocks."""
  monkeypatch.setattr(long_input, 'CHUNK', 8)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(19, size=n).tolist() for n in (21, 14, 3, 19)]
  one = jnp.ones((1, 4), jnp.int32)
  params = Transformer(SPARSE).init(jax.random.key(0), one, one, one)['params']
  # So large that the likeliest token hangs on what is read.
  params = jax.tree.map(lambda x: 3 * x, params)

  def generated():
    tokens = generate_tokens(SPARSE, params, prompts, 5, GREEDY)
    return np.stack(list(tokens), axis=1).tolist()

  if shape is None:
    drawn = generated()
  else:
    devices = jax.devices()[: np.prod(shape)]
    with jax.set_mesh(mesh.make_mesh(*shape, devices=devices)):
      params = jax.device_put(params, jax.P())
      drawn = generated()
  whole = [prompt + row for prompt, row in zip(prompts, drawn, strict=True)]
  # Padded on the right, where padding does not move anything.
  tokens = np.array([row + [0] * (26 - len(row)) for row in whole])
  segments = np.array([[1] * len(row) + [0] * (26 - len(row)) for row in whole])
  positions = np.tile(np.arange(26), (4, 1))
  forward = jax.jit(Transformer(SPARSE).apply, compiler_options=QUICKLY)
  params = jax.tree.map(np.asarray, params)
  logits, _, _ = forward({'params': params}, tokens, positions, segments)
  best = np.argmax(logits, axis=-1)
  for row, prompt, of_row in zip(drawn, prompts, best.tolist(), strict=True):
    assert of_row[len(prompt) - 1 :][:5] == row


def test_a_sparse_cache_is_not_copied():
  """Of one sequence; of several not either, where XLA optimizes."""
  one = np.ones((1, 1), np.int32)
  init = functools.partial(Transformer(SPARSE).init, jax.random.key(0))
  params = jax.eval_shape(init, one, one, one)['params']
  cache = jax.eval_shape(lambda: init_cache(SPARSE, 1, 8192))
  compiled = decode_step.lower(
    SPARSE, GREEDY, params, cache, (one, one, one), 0, 0
  ).compile()
  memory = compiled.memory_analysis()
  num_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache['blocks']))
  assert memory.temp_size_in_bytes < num_bytes / 2


def test_a_bounded_history_wants_prompts_of_one_length():
  bounded = dataclasses.replace(
    SPARSE, sparse=dataclasses.replace(SPARSE.sparse, history_blocks=2)
  )
  with pytest.raises(UserError, match='got lengths 7 and 4'):
    generate_tokens(bounded, {}, PROMPTS, 6, GREEDY)


def test_a_prompt_is_read_in_chunks(params, forward, monkeypatch):
  """And what is told of it on the way is the full forward's loss."""
  readings = []
  at_once = generate(params, sampling=GREEDY)
  monkeypatch.setattr(long_input, 'CHUNK', 3)
  in_chunks = np.stack(
    list(
      generate_tokens(
        CONFIG, params, PROMPTS, 6, GREEDY, on_reading=readings.append
      )
    ),
    axis=1,
  )
  np.testing.assert_array_equal(in_chunks, at_once)
  assert [(r.begin, r.end) for r in readings] == [(0, 3), (3, 6)]
  inputs = left_pad(PROMPTS)
  logits = forward(inputs)[:, : inputs[0].shape[1] - 1]
  losses = np.asarray(jax.jit(token_losses)(logits, inputs[0][:, 1:]))
  is_token = inputs[2][:, :-1] > 0
  for r in readings:
    part = losses[:, r.begin : r.end], is_token[:, r.begin : r.end]
    expected = (part[0] * part[1]).sum() / part[1].sum()
    assert r.nats_per_token == pytest.approx(float(expected), rel=1e-5)


def test_the_seed_decides(params):
  first = generate(params, seed=1)
  np.testing.assert_array_equal(generate(params, seed=1), first)
  assert (generate(params, seed=2) != first).any()


@pytest.mark.slow
def test_any_mesh_gives_the_same_tokens(params):
  prompts, sampling = [*PROMPTS, [7, 7, 7], [1]], Sampling(top_k=9, top_p=0.9)
  expected = generate(params, prompts, 4, sampling)
  devices = jax.devices()[:4]
  with jax.set_mesh(mesh.make_mesh(2, 2, 1, devices=devices)):
    got = generate(jax.device_put(params, jax.P()), prompts, 4, sampling)
  np.testing.assert_array_equal(got, expected)


def test_tokens_come_one_by_one_and_reading_may_stop(params):
  whole = generate(params)
  tokens = generate_tokens(CONFIG, params, PROMPTS, 6, Sampling())
  some = list(itertools.islice(tokens, 2))
  np.testing.assert_array_equal(np.stack(some, axis=1), whole[:, :2])


def test_the_cache_is_written_in_place(params):
  inputs = left_pad(PROMPTS)
  # As it is generated elsewhere: compiled once.
  cache = jax.eval_shape(lambda: init_cache(CONFIG, 2, LENGTH - 1))
  compiled = decode_step.lower(
    CONFIG, GREEDY, params, cache, inputs, 0, 0
  ).compile()
  num_bytes = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
  )
  assert compiled.memory_analysis().alias_size_in_bytes == num_bytes


@pytest.mark.parametrize('sampling', [GREEDY, Sampling()])
def test_one_prompt_in_a_program_of_two_rows_is_as_in_any(
  params, sampling, monkeypatch
):
  expected = generate(params, sampling=sampling)[:1]
  monkeypatch.setitem(batch_rows._LEAST, 'cpu', 2)
  before = decode_step._cache_size()
  drawn = generate(params, PROMPTS[:1], sampling=sampling)
  np.testing.assert_array_equal(drawn, expected)
  assert drawn.shape == (1, 6)
  # The programs are those of two prompts.
  assert decode_step._cache_size() == before


def test_left_padding():
  tokens, positions, segment_ids = left_pad([[5, 6, 7], [8]])
  np.testing.assert_array_equal(tokens, [[5, 6, 7], [0, 0, 8]])
  np.testing.assert_array_equal(positions, [[0, 1, 2], [0, 0, 0]])
  np.testing.assert_array_equal(segment_ids, [[1, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize(
  ('prompts', 'max_tokens', 'word'),
  [([[1]], 0, 'max_tokens'), ([[1], []], 3, 'prompts'), ([], 3, 'prompts')],
)
def test_bad_requests_are_refused_at_once(prompts, max_tokens, word):
  with pytest.raises(UserError, match=f'^{word} must'):
    generate_tokens(CONFIG, {}, prompts, max_tokens, Sampling())
