# SPDX-License-Identifier: Apache-2.0
"""How many slots a server makes, by what it is told to keep; none is made."""

import pytest
from small_run import save_untrained

from jaxsparse.analysis import free_memory
from jaxsparse.config import ModelConfig
from jaxsparse.serving.command import parse_arguments
from jaxsparse.serving.model import Model, Sizes, slot_bytes

LENGTH, LAYERS, HEADS, WIDTH = 1024, 2, 4, 64


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  config = ModelConfig(
    num_layers=LAYERS,
    model_dim=16,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=WIDTH,
    mlp_dim=16,
    vocab_size=257,
  )
  return save_untrained(tmp_path_factory.mktemp('run'), config)


def test_smaller_rows_make_room_for_more_slots(workdir, monkeypatch):
  monkeypatch.setattr(free_memory, 'of_device', lambda device: 1 << 26)

  def sized(kv):
    sizes = Sizes(length=LENGTH, chunk=16, memory_fraction=0.5, kv=kv)
    model = Model(str(workdir), sizes, lambda line: None)
    return slot_bytes(model.config, LENGTH), model._num_slots(0)

  exact, num_exact = sized('exact')
  small, num_small = sized('int8')
  # Positions, documents and one index besides.
  rows = LENGTH * LAYERS * 2 * HEADS
  assert exact == rows * WIDTH * 4 + LENGTH * 8 + 4
  assert small == rows * (WIDTH + 4) + LENGTH * 8 + 4
  assert sized(None) == (exact, num_exact)
  assert (num_exact, num_small) == (7, 16)


def test_its_flag():
  assert parse_arguments(['--model-path=x']).kv is None
  assert parse_arguments(['--model-path=x', '--kv=int8']).kv == 'int8'
