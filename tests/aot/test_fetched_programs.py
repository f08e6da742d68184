# SPDX-License-Identifier: Apache-2.0
"""What a TPU executes where the host fetches the rows of a memory layer.

Run with `pytest -m aot`, extra `aot`. JAX compiles a program with callbacks for
a GPU on a machine that has one alone.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import targets

from jaxsparse import config
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.tables.host_table import HostTable, Source
from jaxsparse.run import table_leaves

pytestmark = pytest.mark.aot

# A table of 256 MiB; read in block 0 and added after block 2.
MODEL = config.ModelConfig(
  num_layers=3, model_dim=256, num_heads=4, num_kv_heads=4, head_dim=64,
  mlp_dim=512, vocab_size=256,
  memory=config.MemoryConfig(
    num_keys=512, key_dim=64, num_selected=16, value_dim=256,
    expansion=1, placements=((0, 2),),
  ),
)  # fmt: skip


def test_a_tpu_asks_for_rows_blocks_before_it_waits_for_them():
  tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
  shapes = jax.eval_shape(
    lambda: Transformer(MODEL).init(
      jax.random.key(0), jnp.zeros((4, 16), jnp.int32)
    )
  )['params']
  rest, tables = table_leaves.split(shapes)
  (path, table), *_ = tables.items()
  assert table.size * 4 == 2**28

  def forward(rest, tokens):
    on_host = HostTable(Source(None), table.shape, np.dtype(table.dtype))
    params = table_leaves.joined(rest, {path: on_host})
    return Transformer(MODEL).apply({'params': params}, tokens)[0]

  program = targets.compile_for('v5e', forward, rest, tokens)
  assert program.temp_bytes < table.size * 4 / 8
  assert f'[{table.shape[0]},{table.shape[1]}]' not in program.text
  entry = program.text[program.text.index('\nENTRY') :]
  steps = re.findall(
    r' (send|while)\(| fusion\(.*op_name="[^"]*(block_01)/', entry
  )
  steps = [name or block for name, block in steps]
  # The ids go to the host, all of the block between runs, then windows come.
  assert steps[0] == 'send'
  assert steps[-1] == 'while'
  assert steps.count('block_01') > 8
  assert steps[::-1].index('send') > steps.count('block_01')
