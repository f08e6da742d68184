# SPDX-License-Identifier: Apache-2.0
"""Differences of rows beside a model's tables, and in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import draw

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import MemoryConfig, ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference.quantize import dequantized
from jaxsparse.nn import row_deltas
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.ops.memory.sharded_bag import sharded_value_bag
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.ops.tables.quantized_table import encoded
from jaxsparse.run import adapter_files

B, T = 4, 6
# Values and pre-values, and a table that two layers read windows of.
MODEL = ModelConfig(
  num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
  mlp_dim=16, vocab_size=20,
  memory=MemoryConfig.peer(
    num_keys=8, key_dim=4, num_heads=1, num_selected=6, value_dim=16,
    pre_value_dim=16, shared_rows=64, placements=((0, 0), (1, 1)),
  ),
)  # fmt: skip
NAMES = ('memory/value_table', 'memory/pre_value_table')
ROWS = dict(
  first=np.arange(0, 64, 3, dtype=np.int32),
  second=np.arange(1, 64, 4, dtype=np.int32),
  # Rows of its own, none of the first's.
  third=np.arange(2, 64, 6, dtype=np.int32),
)


@functools.cache
def params():
  tokens = jnp.ones((1, 1), jnp.int32)
  drawn = draw(Transformer(MODEL).init, tokens, deviation=0.3)
  return jax.device_put(drawn['params'])


def deltas(name):
  rng = np.random.default_rng(len(ROWS[name]))
  rows = ROWS[name]
  values = [rng.normal(size=(len(rows), 16)).astype(np.float32) for _ in NAMES]
  return {n: (rows, v) for n, v in zip(NAMES, values, strict=True)}


TOKENS = np.random.default_rng(1).integers(20, size=(B, T)).astype(np.int32)


@jax.jit
def logits_of(params, tokens):
  return Transformer(MODEL).apply({'params': params}, tokens)[0]


def forward(params):
  return np.asarray(logits_of(params, jnp.asarray(TOKENS)))


@jax.jit
def decode(params, token, position, cache):
  model = Transformer(MODEL)
  return model.apply({'params': params}, token, position, cache=cache)[:2]


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_sequences_of_a_batch_read_the_rows_of_their_model():
  places = [None, deltas('first'), deltas('second')]
  chosen = jnp.array([0, 1, 2, 1], jnp.int32)
  beside = row_deltas.several_beside(params(), places, chosen, 30)
  logits = forward(beside)
  base = forward(params())
  for i, of in enumerate(chosen):
    model = params()
    if of:
      model, _ = row_deltas.added(model, places[int(of)])
      assert np.abs(logits[i] - base[i]).max() > 0.01
    close(logits[i], forward(model)[i])
  cache = init_cache(MODEL, B, T)
  for t in range(T):
    token = jnp.asarray(TOKENS[:, t : t + 1])
    step, cache = decode(beside, token, jnp.full_like(token, t), cache)
    close(step[:, 0], logits[:, t])


def test_what_is_learnt_begins_as_the_base_and_is_saved_as_it_ends():
  rows = {'memory': ROWS['first']}
  room = row_deltas.learnt(params(), rows)
  zeros = row_deltas.zeros(room)
  start = row_deltas.with_values(room, zeros)
  assert np.array_equal(forward(start), forward(params()))
  values = jax.tree.map(lambda x: x + 0.5, zeros)
  end = row_deltas.with_values(room, values)
  tensors = row_deltas.to_tensors(end)
  read = row_deltas.from_tensors(tensors, params(), 'x')
  beside = row_deltas.beside(params(), read)
  assert np.array_equal(forward(beside), forward(end))
  table = params()['memory']['value_table']
  np.testing.assert_allclose(
    tensors['memory/value_table/old_norm'],
    np.linalg.norm(table[ROWS['first']], axis=1),
    rtol=1e-6,
  )
  assert row_deltas.changed_share(tensors) == 1


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rows_are_added_and_taken_back_to_the_bit(dtype):
  base = jax.tree.map(lambda x: x.astype(dtype), params())
  changed, old = row_deltas.added(base, deltas('first'))
  for name in NAMES:
    table, before = (row_deltas.tables(x)[name] for x in (changed, base))
    is_changed = np.any(np.asarray(table != before), axis=1)
    assert np.flatnonzero(is_changed).tolist() == ROWS['first'].tolist()
  saved = {name: (ROWS['first'], old[name]) for name in NAMES}
  back = row_deltas.restored(changed, saved)
  assert jax.tree.all(jax.tree.map(np.array_equal, back, base))


def test_deltas_of_other_rows_commute_and_others_overlap():
  one, other = deltas('first'), deltas('third')
  ways = [(one, other), (other, one)]
  results = []
  for way in ways:
    model = params()
    for delta in way:
      model, _ = row_deltas.added(model, delta)
    results.append(model)
  assert jax.tree.all(jax.tree.map(np.array_equal, *results))
  assert row_deltas.summed([one, other])[1] == dict.fromkeys(sorted(NAMES), 0)
  shared = len(np.intersect1d(ROWS['first'], ROWS['second']))
  _, overlaps = row_deltas.summed([one, deltas('second')])
  assert shared > 0
  assert set(overlaps.values()) == {shared}


def tensors(**changes):
  """A file with changes, by names of arrays; None leaves one out."""
  name = NAMES[0]
  rows, values = deltas('first')[name]
  arrays = dict(rows=rows, values=values) | changes
  return {f'{name}/{k}': v for k, v in arrays.items() if v is not None}


FIRST = ROWS['first']


@pytest.mark.parametrize(
  ('changes', 'sentence'),
  [
    (dict(rows=FIRST + 1), "must be of the 64 of the table, got 1 to 64"),
    (dict(rows=FIRST - 1), 'must be of the 64 of the table, got -1 to 62'),
    (dict(rows=FIRST[::-1].copy()), 'ascending and each once, got 63 before'),
    (dict(rows=FIRST // 6 * 6), 'ascending and each once, got 0 before 0'),
    (dict(rows=FIRST.astype(np.int64)), 'must be a list of int32, got int64'),
    (dict(values=np.ones((22, 8), np.float32)), r'\[22, 16\], got \[22, 8\]'),
    (dict(values=np.ones((3, 16), np.float32)), r'\[22, 16\], got \[3, 16\]'),
    (dict(values=None), "must have 'rows' and 'values'"),
  ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    row_deltas.from_tensors(tensors(**changes), params(), 'x/rows.safetensors')


def test_tables_of_other_models_are_refused():
  other = {f'block_07/{k}': v for k, v in tensors().items()}
  with pytest.raises(
    UserError, match="'block_07/memory/value_table', which is"
  ):
    row_deltas.from_tensors(other, params(), 'x')
  with pytest.raises(UserError, match='holds no rows'):
    row_deltas.from_tensors({}, params(), 'x')


def test_ten_thousand_rows_of_a_large_table(tmp_path):
  """A table of 1.6 billion bfloat16 numbers, in a file with holes."""
  num_rows, width, count = 1_572_864, 1024, 10_000
  path = tmp_path / 'table'
  bfloat16 = np.dtype(jnp.bfloat16)
  table = np.memmap(path, bfloat16, 'w+', shape=(num_rows, width))
  rng = np.random.default_rng(0)
  rows = rng.choice(num_rows, count, replace=False)
  rows = np.sort(rows).astype(np.int32)
  own = rng.integers(-9, 9, (count, width), np.int8).astype(bfloat16)
  base = {'memory': {'value_table': HostTable.of(table)}}
  room = row_deltas.learnt(base, {'memory': rows})
  learnt = row_deltas.with_values(
    room, {'memory': {'value_table': {'values': jnp.asarray(own)}}}
  )
  tensors = row_deltas.to_tensors(learnt)
  folder = tmp_path / 'adapter'
  adapter_files.write(folder, tensors, dict(kind='rows', base='x'))
  file = folder / 'rows.safetensors'
  assert file.stat().st_size < 21e6
  read, _ = adapter_files.read(folder)
  deltas = row_deltas.from_tensors(read, base, str(folder))
  _, values = deltas['memory/value_table']
  assert values.dtype == bfloat16
  assert np.array_equal(values, own)
  beside = row_deltas.beside(base, deltas)['memory']['value_table']
  # Reads of a changed row and of another.
  other = next(i for i in range(num_rows) if i not in rows)
  slot = jnp.array([[rows[7]], [other]], jnp.int32)
  pooled = sharded_value_bag(beside, slot, jnp.ones((2, 1, 1), jnp.float32))
  assert np.array_equal(pooled[0, 0], own[7].astype(np.float32))
  assert not pooled[1].any()


@pytest.mark.parametrize('scheme', ['columns', 'rows', 'grid'])
def test_rows_are_added_on_a_mesh(scheme):
  path, rows = 'memory/value_table', ROWS['first']
  whole = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
  delta = {path: deltas('first')[path]}
  expected = whole.copy()
  expected[rows] += delta[path][1]
  with jax.set_mesh(mesh_lib.make_mesh(2, 2, 2)):
    table = jax.device_put(whole, mesh_lib.table(scheme))
    base = {'memory': {'value_table': table}}
    changed, old = row_deltas.added(base, delta)
    found = changed['memory']['value_table']
    assert found.sharding == table.sharding
    assert np.array_equal(found, expected)
    assert np.array_equal(old[path], whole[rows])
    beside = row_deltas.tables(row_deltas.beside(base, delta))[path]
    assert np.array_equal(row_deltas.merged(beside), expected)


def test_beside_rows_of_fewer_bits_a_delta_stays():
  path, rows = 'memory/value_table', ROWS['first']
  whole = row_deltas.tables(params())[path]
  base = {'memory': {'value_table': encoded(whole, 'int8')}}
  delta = {path: deltas('first')[path]}
  with pytest.raises(UserError, match='must be of floats on the device'):
    row_deltas.added(base, delta)
  beside = row_deltas.beside(base, delta)
  tensors = row_deltas.to_tensors(beside)
  assert tensors[f'{path}/values'].dtype == np.float32
  numbers = np.array(base['memory']['value_table'].dequantized())
  norm = np.linalg.norm(numbers[rows], axis=1)
  np.testing.assert_allclose(tensors[f'{path}/old_norm'], norm, rtol=1e-6)
  numbers[rows] += delta[path][1]
  found = dequantized(beside)['memory']['value_table']
  np.testing.assert_allclose(found, numbers, rtol=1e-6)
