# SPDX-License-Identifier: Apache-2.0
"""No train step holds a second table, on one device or on eight.

The model is small and its value tables are large, so that anything of a
table's size is one. The state is donated: what is not overwritten in place
shows as bytes that are not aliased, as a temporary or as a copy.

Run with `pytest -m aot`, extra `aot`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import targets
from compiled import arrays_of_size, payloads
from recipes import RECIPES

from jaxsparse import config as config_lib
from jaxsparse import mesh as mesh_lib
from jaxsparse.training.step import init_state, train_step

pytestmark = pytest.mark.aot

NUM_KEYS, VALUE_DIM, SEQ_LEN, BATCH = 512, 1024, 32, 8
TABLE = NUM_KEYS**2 * VALUE_DIM  # elements: 1 GiB in f32


def _config(value_optimizer, scheme, dtype):
  config = RECIPES['ultramem:tiny']()
  memory = dataclasses.replace(
    config.model.memory,
    num_keys=NUM_KEYS,
    value_dim=VALUE_DIM,
    table=config_lib.TableConfig(scheme=scheme),
  )
  return config_lib.validated(
    dataclasses.replace(
      config,
      model=dataclasses.replace(
        config.model, vocab_size=257, memory=memory, dtype=dtype
      ),
      data=dataclasses.replace(config.data, seq_len=SEQ_LEN, batch_size=BATCH),
      optimizer=dataclasses.replace(
        config.optimizer, value_optimizer=value_optimizer
      ),
    )
  )


def _program(
  device,
  value_optimizer,
  scheme='columns',
  sizes=(1, 1, 1),
  dtype='float32',
):
  config = _config(value_optimizer, scheme, dtype)
  mesh = targets.make_mesh(device, sizes)
  state = mesh_lib.abstract(functools.partial(init_state, config), mesh=mesh)
  tokens = jax.sharding.NamedSharding(mesh, jax.P(mesh_lib.TOKENS))
  types = dict(
    tokens=jnp.int32,
    targets=jnp.int32,
    positions=jnp.int32,
    segment_ids=jnp.int32,
    loss_weight=jnp.float32,
  )
  batch = {
    name: jax.ShapeDtypeStruct((BATCH, SEQ_LEN), dtype, sharding=tokens)
    for name, dtype in types.items()
  }
  return targets.compile_for(
    device,
    functools.partial(train_step, config),
    state,
    batch,
    sizes=sizes,
    donate=(0,),
  )


@pytest.mark.parametrize('device', ['h100', 'v5e'])
@pytest.mark.parametrize(
  ('value_optimizer', 'scheme', 'sizes'),
  [
    ('row_adam', 'columns', (1, 1, 1)),
    ('row_adam', 'columns', (1, 8, 1)),
    ('row_adam', 'rows', (2, 4, 1)),
    ('adamw', 'columns', (1, 8, 1)),
  ],
)
def test_tables_and_their_state_change_in_place(
  device, value_optimizer, scheme, sizes
):
  program = _program(device, value_optimizer, scheme, sizes)
  _is_in_place(program, value_optimizer, TABLE // sizes[1])


def _is_in_place(program, value_optimizer, part):
  # What a step returns beside the state are a few numbers.
  assert program.output_bytes - program.alias_bytes < 2**16
  for op in ('copy', 'copy-start', 'all-gather', 'all-gather-start'):
    assert not arrays_of_size(program.text, op, part // 4)
  # Dense AdamW holds the gradient of its part, the others rows that were read.
  gradient = part if value_optimizer == 'adamw' else 0
  assert program.temp_bytes < 4 * (gradient + 0.9 * part)
  # Copies of a part exchange what they read, never the part.
  assert max([0, *(x.size for x in payloads(program.text))]) < part / 4


@pytest.mark.parametrize('value_optimizer', ['row_adam', 'adamw'])
def test_float16_on_a_gpu_without_bfloat16(value_optimizer):
  """A step may be left out, and needs no copy of what it would change."""
  program = _program('t4', value_optimizer, dtype='float16')
  _is_in_place(program, value_optimizer, TABLE)
  # Products of activations are in float16; f32 alone reach the head's sums.
  assert 'f16[' in program.text
  assert 'bf16[' not in program.text
