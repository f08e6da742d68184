# SPDX-License-Identifier: Apache-2.0
"""What has no room is refused before anything is made."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.analysis import free_memory
from jaxsparse.config import ModelConfig, SparseAttentionConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference import decoding, room
from jaxsparse.inference.sampling import Sampling
from jaxsparse.nn.transformer import Transformer, init_cache

CONFIG = ModelConfig(
  num_layers=1,
  model_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=16,
  vocab_size=19,
)
SPARSE = dataclasses.replace(
  CONFIG,
  attention_pattern=('sparse',),
  sparse=SparseAttentionConfig(block=4, tile=4, window_blocks=1, max_blocks=2),
)
# A key and a value in float32, a position and a document.
ROW = 2 * 4 * 4 + 4 + 4


@pytest.fixture
def free(monkeypatch):
  """Sets the bytes that there are."""

  def set_to(num_bytes):
    monkeypatch.setattr(free_memory, 'of_device', lambda device: num_bytes)

  return set_to


def most_that_fits(error):
  number = re.search('about ([0-9,]+) would fit', str(error))[1]
  return int(number.replace(',', ''))


def test_a_row_of_the_cache_is_counted_right():
  cache = jax.eval_shape(lambda: init_cache(CONFIG, 3, 100))
  num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert num_bytes == 300 * ROW + 4


@pytest.mark.parametrize(('batch_size', 'beside'), [(1, 0), (3, 1), (1, 3)])
def test_the_most_that_is_named_is_the_most_that_fits(free, batch_size, beside):
  """Where programs take as much again as the cache, or three times as much."""
  free(batch_size * ROW * 5000 + 4)
  asked = []

  def held(cache):
    asked.append(cache['blocks']['block_00']['attention']['key'].shape[2])
    return beside * batch_size * ROW * asked[-1]

  with pytest.raises(UserError, match=r'^max_tokens = 100,000,000 ') as caught:
    room.check(CONFIG, batch_size, 11, 10**8, held)
  # No program is asked of a size that can't be.
  assert max(asked) <= 5000
  most, exact = most_that_fits(caught.value), 5000 // (1 + beside) - 10
  assert 0.9 * exact < most <= exact
  room.check(CONFIG, batch_size, 11, most, held)
  if beside:
    with pytest.raises(UserError):
      room.check(CONFIG, batch_size, 11, int(1.1 * exact), held)


def test_a_long_prompt_and_a_batch_may_be_too_much_by_themselves(free):
  free(ROW * 5000)
  with pytest.raises(
    UserError, match=r'2 at once.*: shorten the prompt or take'
  ):
    room.check(CONFIG, 2, 4000, 5)
  with pytest.raises(UserError, match='or bound the history'):
    room.check(SPARSE, 1, 10**6, 5)
  bounded = dataclasses.replace(SPARSE.sparse, history_blocks=2)
  bounded = dataclasses.replace(SPARSE, sparse=bounded)
  room.check(bounded, 1, 10**6, 10**9)


def test_positions_have_32_bits(free):
  free(2**80)
  room.check(CONFIG, 1, 1, 2**31 - 1)
  with pytest.raises(UserError, match=r'^sample_tokens .*2,147,483,647 tokens'):
    room.check(CONFIG, 1, 2, 2**31 - 1, name='sample_tokens')


def test_nobody_knows_how_much_there_is(free):
  free(None)
  room.check(CONFIG, 1, 1, 10**9)


def test_devices_of_a_cpu_share_the_hosts(free):
  """And each has its part of the cache."""
  free(4 * ROW * 1000)
  devices = jax.devices()[:4]
  with jax.set_mesh(mesh.make_mesh(2, 2, 1, devices=devices)):
    room.check(CONFIG, 4, 11, 900)
    with pytest.raises(UserError, match='4 at once'):
      room.check(CONFIG, 4, 11, 1100)


def test_generation_counts_what_its_programs_hold(free, monkeypatch):
  """Before it makes a cache; where memory is ample it does not ask them."""
  monkeypatch.setattr(decoding, 'chunk_size', lambda config: 512)
  one = np.ones((1, 1), np.int32)
  init = functools.partial(Transformer(CONFIG).init, jax.random.key(0))
  params = jax.eval_shape(init, one, one, one)['params']
  made = []
  monkeypatch.setattr(
    decoding, '_generate', lambda *args: iter(made.append(args) or ())
  )
  # After a chunk a token is left, which the step of drawing reads.
  prompt = np.ones(513, np.int32)

  def generate():
    decoding.generate_tokens(CONFIG, params, [prompt], 400, Sampling())

  cache = 913 * ROW
  # Scores of a chunk, of two heads.
  scores = 4 * 2 * 512 * 913
  free(cache + scores // 2)
  with pytest.raises(UserError, match='prompt of 513 tokens'):
    generate()
  assert not made
  free(10 * (cache + scores))
  monkeypatch.setattr(decoding, '_temporary_bytes', lambda *args: 1 / 0)
  generate()
  assert made
