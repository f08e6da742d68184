# SPDX-License-Identifier: Apache-2.0
"""What a model knows, asked where no mesh is set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.config import Config, ModelConfig
from jaxsparse.data import facts, needles
from jaxsparse.data.needles import Needles
from jaxsparse.data.tokenizer import ByteTokenizer, load_from_workdir
from jaxsparse.experiments.compare import recall, retrieval
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run.progress import Reporter
from jaxsparse.training import evaluation

MODEL = ModelConfig(
  num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
  vocab_size=ByteTokenizer().vocab_size,
)  # fmt: skip


@pytest.fixture(scope='module')
def params():
  assert jax.sharding.get_mesh().empty
  one = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(Transformer(MODEL).init)
  return init(jax.random.key(0), one, one, one)['params']


def test_facts_are_asked_for(params):
  people = facts.make_people(3, 0)
  forward = recall.model_forward(MODEL, params)
  found = recall.measure(forward, ByteTokenizer(), people, batch_size=18)
  assert (found.share, found.bits) == (0, 0)


def test_needles_are_asked_for(tmp_path):
  small = Needles(num_needles=4, num_fillers=3, gap=2)
  words = needles.make_tokenizer()
  path = tmp_path / 'tokenizer.json'
  path.write_text(words.to_str())
  found = retrieval.measure(
    lambda batch: jax.nn.one_hot(batch['targets'], needles.VOCAB_SIZE),
    load_from_workdir(tmp_path),
    small,
    seed=0,
  )
  assert found.share == 1


def test_text_is_validated(params):
  ones = np.ones((2, 4), np.int32)
  batch = dict(
    tokens=ones, targets=ones, positions=ones, segment_ids=ones,
    loss_weight=np.ones((2, 4), np.float32),
  )  # fmt: skip
  config = Config(model=MODEL)
  reporter = Reporter(is_silent=True)
  found = evaluation.validate(
    config, params, [batch], 8, reporter, lambda: False
  )
  assert 0 < found.loss < 20
