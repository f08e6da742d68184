# SPDX-License-Identifier: Apache-2.0
"""What a decode step of the 680M family is on an H100: kernels and graphs.

Run with `pytest -m aot`, extra `aot`. At a small batch a step takes as long as
its launches, so the bounds here are what it launches, with parameters folded as
a server has them: they are to fall.
"""

import functools
import pathlib
import tempfile

import decode_steps
import launches
import pytest
import targets

from jaxsparse.ops.attention import libraries as attention_libraries
from jaxsparse.ops.experts import grouped_matmul_libraries
from jaxsparse.ops.kernels import probe

pytestmark = pytest.mark.aot


@pytest.fixture(autouse=True)
def _kernels_compile(monkeypatch):
  """What a device would be asked before its kernels are taken."""
  monkeypatch.setattr(probe, 'first_error', lambda *args: None)
  probe._compilation_error.cache_clear()
  attention_libraries._decoding_error.cache_clear()
  monkeypatch.setattr(
    grouped_matmul_libraries, 'unsupported_reason', lambda *args: None
  )


@functools.cache
def step(name: str, batch_size: int, num_layers: int = 2) -> targets.Program:
  """Of two blocks: what the second adds is what each further one would."""
  with tempfile.TemporaryDirectory() as folder:
    return decode_steps.compile_step(
      name, num_layers, batch_size, pathlib.Path(folder)
    )


@functools.cache
def answer(name: str) -> targets.Program:
  """Of one text, by generate and the server, as two rows of four blocks."""
  return decode_steps.compile_answer(name, 4, 1)


def in_loop(name, batch_size):
  return launches.repeated(step(name, batch_size).text)


def in_block(found, batch_size):
  """Without what is written once for all blocks, in the name of the last."""
  rows = decode_steps.CONTEXT + decode_steps.STEPS
  own = launches.within(found, '/block_01/')
  return sum(f's32[{batch_size},2,{rows}]' not in x.shape for x in own)


@pytest.mark.parametrize(
  ('name', 'batch_size', 'most'),
  [
    ('dense', 64, 11),
    ('dense', 16, 12),
    ('dense', 2, 13),
    # Its products are no matrix products.
    ('dense', 1, 20),
    ('moe', 64, 14),
    ('moe', 2, 17),
  ],
)
def test_kernels_of_a_block(name, batch_size, most):
  assert 5 < in_block(in_loop(name, batch_size), batch_size) <= most


@pytest.mark.parametrize('batch_size', [64, 2])
def test_kernels_outside_blocks(batch_size):
  """Two of them are the loop's: its count, and the tokens that it returns."""
  found = in_loop('dense', batch_size)
  assert 5 < len(found) - 2 * in_block(found, batch_size) <= 9


def test_kernels_outside_blocks_of_an_answer():
  """Whether a slot draws at random, which it asks first, is one of them."""
  found = launches.kernels(answer('dense').text)
  assert 5 < len(found) - 4 * in_block(found, 2) <= 9


@pytest.mark.parametrize('batch_size', [64, 2])
def test_kernels_of_a_memory_layer(batch_size):
  with_memory, without = (
    len(in_loop(name, batch_size)) for name in ('ultramem', 'dense')
  )
  assert 5 < with_memory - without <= 12


def test_bytes_of_a_memory_layer():
  """Least are 32 MB: keys, both maps and the rows."""
  table = decode_steps.table_shape('ultramem')
  memory = decode_steps.model('ultramem', 2).memory
  assert memory
  num_read = 64 * memory.num_heads * memory.num_selected
  taken = {table: 2 * num_read * table[1]}
  with_memory, without = (
    launches.moved_in_loops(step(name, 64).text, taken)
    for name in ('ultramem', 'dense')
  )
  assert 32e6 < with_memory - without <= 75e6


@pytest.mark.parametrize('name', ['dense', 'moe', 'pkm', 'ultramem'])
def test_a_step_is_one_graph(name):
  """And a copy behind it. XLA's kernel for an order of its own would cut it.

  So it does on JAX 0.11; on 0.12 it needs 32 MiB of scratch instead.
  """
  program = step(name, 64)
  assert 'TopK' not in program.text
  assert 'kSelectK' not in program.thunks
  assert 1 <= launches.graphs(program.text, program.thunks) <= 2


@pytest.mark.parametrize(
  ('name', 'most'), [('dense', 14e6), ('ultramem', 15e6)]
)
def test_a_step_keeps_its_cache_and_little_else(name, most):
  """Logits are 12.9 MB."""
  program = step(name, 64, 4)
  assert program.alias_bytes == decode_steps.cache_bytes(name, 4, 64)
  assert program.temp_bytes < most


@pytest.mark.parametrize('name', ['dense', 'moe', 'pkm', 'ultramem'])
def test_nothing_is_laid_out_anew_before_the_loop(name):
  """What the bench's loop fills is, with the slots or experts chosen."""
  assert launches.written_before_loops(step(name, 64).text) < 10**6


@pytest.mark.parametrize('name', ['dense', 'moe', 'ultramem'])
def test_one_text_has_no_weight_written_anew(name):
  """By generate and the server: no copy, transpose or product of that size."""
  program = answer(name)
  config = decode_steps.model(name, 4)
  rows = decode_steps.CONTEXT + decode_steps.STEPS
  cache = 2, config.num_kv_heads, rows, config.head_dim
  found = launches.kernels(program.text)
  assert not launches.written(found, 10**6, cache)
  assert program.temp_bytes < 2e6


def test_two_rows_take_no_weights_in_another_layout():
  """As one row does: all of them, before the loop."""
  rest = launches.written_before_loops(step('dense', 2).text)
  assert rest < 2**20
  assert launches.written_before_loops(step('dense', 1).text) > 10 * rest


def test_the_largest_file_of_an_autotuner_is_read(tmp_path):
  folder = tmp_path / 'autotune_h100'
  assert targets.tuned_file('h100', tmp_path) is None
  folder.mkdir()
  for name, text in (('dense_64', 'version: 3'), ('moe_64', 'version: 3\n\n')):
    (folder / f'{name}.txt').write_text(text)
  assert targets.tuned_file('h100', tmp_path) == folder / 'moe_64.txt'
  assert targets.tuned_file('t4', tmp_path) is None
