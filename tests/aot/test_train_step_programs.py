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
ROW_OPTIMIZERS = ('row_adam', 'lazy_row_adam', 'row_adagrad')


def _config(value_optimizer, scheme):
  config = RECIPES['ultramem_tiny']()
  memory = dataclasses.replace(
    config.model.memory,
    num_keys=NUM_KEYS,
    value_dim=VALUE_DIM,
    scheme=scheme,
  )
  return config_lib.validated(
    dataclasses.replace(
      config,
      model=dataclasses.replace(config.model, vocab_size=257, memory=memory),
      data=dataclasses.replace(config.data, seq_len=SEQ_LEN, batch_size=BATCH),
      optimizer=dataclasses.replace(
        config.optimizer, value_optimizer=value_optimizer
      ),
    )
  )


@functools.cache
def _program(device, value_optimizer, scheme='columns', sizes=(1, 1, 1)):
  config = _config(value_optimizer, scheme)
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
  program = targets.compile_for(
    device,
    functools.partial(train_step, config),
    state,
    batch,
    sizes=sizes,
    donate=(0,),
  )
  return program


def _assert_in_place(program, table_bytes):
  # What a step returns beside the state are a few numbers.
  assert program.output_bytes - program.alias_bytes < 2**16
  for op in ('copy', 'copy-start', 'all-gather', 'all-gather-start'):
    assert not arrays_of_size(program.text, op, table_bytes // 4)


@pytest.mark.parametrize('value_optimizer', ROW_OPTIMIZERS)
@pytest.mark.parametrize('device', ['h100', 'v5e'])
def test_row_optimizers_hold_only_the_rows_read(device, value_optimizer):
  program = _program(device, value_optimizer)
  _assert_in_place(program, TABLE * 4)
  assert program.temp_bytes < TABLE * 4 / 4


@pytest.mark.parametrize('device', ['h100', 'v5e'])
def test_adamw_holds_one_gradient_of_the_table(device):
  program = _program(device, 'adamw')
  _assert_in_place(program, TABLE * 4)
  assert program.temp_bytes < TABLE * 4 * 1.25


@pytest.mark.parametrize('device', ['h100', 'v5e'])
@pytest.mark.parametrize(
  ('scheme', 'sizes'), [('columns', (1, 8, 1)), ('rows', (2, 4, 1))]
)
@pytest.mark.parametrize('value_optimizer', ['adamw', 'row_adam'])
def test_a_part_of_the_table_stays_where_it_is(
  device, value_optimizer, scheme, sizes
):
  program = _program(device, value_optimizer, scheme, sizes)
  part = TABLE // sizes[1]
  _assert_in_place(program, part * 4)
  gradients = part if value_optimizer == 'adamw' else 0
  assert program.temp_bytes < 4 * (gradients + part / 2)
  # Copies of a part add up their gradients, where these are dense.
  largest = max(payload.size for payload in payloads(program.text))
  if value_optimizer == 'row_adam' or sizes[0] == 1:
    assert largest < part / 4
