# SPDX-License-Identifier: Apache-2.0
"""Row stores: what is sealed can be had again, whatever happened since."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.run import row_file, row_store, row_undo
from jaxsparse.run.row_store import Change, Leaf
from jaxsparse.run.row_undo import Before

LEAVES = {
  'block_00/memory/value_table': Leaf(1000, 16, 'float32'),
  'block_00/memory/value_table.mu': Leaf(1000, 16, 'float32'),
  'block_00/memory/value_table.touched': Leaf(1000, 0, 'int32'),
  'packed': Leaf(200, 12, 'uint8', {'kind': 'int8', 'parts': 1}),
  'narrow': Leaf(200, 4, 'bfloat16'),
}
GROUPS = list(LEAVES)[:3], ['packed', 'narrow']


def draw(rng, leaf, num_rows):
  shape = (num_rows, leaf.width) if leaf.width else (num_rows,)
  return rng.integers(1, 100, shape).astype(row_file.dtype_of(leaf.dtype))


def change(store, rng, num_rows=20):
  """Writes some rows of all leaves."""
  before, changes = [], []
  for names in GROUPS:
    most = store.leaves[names[0]].num_rows
    ids = np.sort(rng.choice(most, num_rows, replace=False)).astype(np.int64)
    old = {n: store.files[n].rows[ids] for n in names}
    new = {n: draw(rng, store.leaves[n], num_rows) for n in names}
    before.append(Before(ids, old))
    changes.append(Change(ids, new))
  store.note(before)
  store.write(changes)


def rows(store):
  return {name: file.rows.copy() for name, file in store.files.items()}


def assert_equal(actual, expected):
  for name in expected:
    assert actual[name].tobytes() == expected[name].tobytes(), name


@pytest.fixture
def begun(tmp_path, rng):
  """A store at step 0 with rows in it, closed; and its rows."""
  store = row_store.create(tmp_path / 'tables', LEAVES)
  for name, leaf in LEAVES.items():
    store.fill(name, 100, draw(rng, leaf, 50))
  store.seal(0)
  expected = rows(store)
  store.close()
  return tmp_path / 'tables', expected


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_every_sealed_step_can_be_opened_until_it_is_forgotten(begun, rng):
  folder, first = begun
  store = row_store.open_at(folder, 0, is_private=False)
  states = {0: first}
  for step in (10, 20, 30):
    for _ in range(3):
      change(store, rng)
    store.seal(step)
    states[step] = rows(store)
  change(store, rng)
  store.close()
  for step in (0, 10, 20, 30):
    reader = row_store.open_at(folder, step)
    assert_equal(rows(reader), states[step])
    reader.verify()
    reader.close()
  store = row_store.open_at(folder, 20, is_private=False)
  assert_equal(rows(store), states[20])
  assert row_store.sealed_steps(folder) == [0, 10, 20]
  store.forget_before(20)
  store.close()
  with pytest.raises(UserError, match=r'no tables of step 10.*\[20\]'):
    row_store.open_at(folder, 10)
  assert sorted(p.name for p in (folder / 'undo').iterdir()) == ['0000000020']


def test_a_private_map_changes_no_file_and_none_may_be_written(begun, rng):
  folder, _ = begun
  store = row_store.open_at(folder, 0, is_private=False)
  change(store, rng)
  store.close()
  before = {
    p: (p.stat().st_mtime_ns, p.read_bytes())
    for p in folder.rglob('*')
    if p.is_file()
  }
  for path in before:
    path.chmod(0o444)
  reader = row_store.open_at(folder, 0)
  reader.files['packed'].array()
  reader.close()
  assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before}


class Killed(BaseException):
  pass


def killed_at(monkeypatch, number):
  """Ends everything before the write of that number, and half in it."""
  count = iter(range(10**6))

  def watched(write, half=None):
    def call(*args, **kwargs):
      if next(count) == number:
        if half is not None:
          half(*args, **kwargs)
        raise Killed
      return write(*args, **kwargs)

    return call

  def half_of_file(descriptor, content):
    os.write(descriptor, content[: len(content) // 2])

  def half_of_rows(name, ids, new, store):
    half = len(ids) // 2
    store.files[name].rows[ids[:half]] = new[:half]

  write = row_undo._write_all
  monkeypatch.setattr(row_undo, '_write_all', watched(write, half_of_file))
  put = row_file.RowFile.put
  monkeypatch.setattr(
    row_file.RowFile,
    'put',
    watched(put, lambda file, ids, new: put(file, ids[::2], new[::2])),
  )
  for module, name in (
    (row_store, 'write_whole'),
    (row_store, '_sync_folder'),
    (row_undo.Journal, '__init__'),
    (row_file.RowFile, 'flush'),
    (os, 'fdatasync'),
  ):
    monkeypatch.setattr(module, name, watched(getattr(module, name)))
  unlink = row_store.pathlib.Path.unlink
  monkeypatch.setattr(row_store.pathlib.Path, 'unlink', watched(unlink))
  return count


def test_a_kill_between_any_two_writes_loses_nothing(tmp_path, monkeypatch):
  """The dense part is saved after the seal, and may be of the step before."""
  # A killed process takes nothing from the system.
  monkeypatch.setattr(os, 'fsync', lambda descriptor: None)
  monkeypatch.setattr(os, 'fdatasync', lambda descriptor: None)
  number = 0
  while True:
    folder = tmp_path / str(number)
    rng = np.random.default_rng(1)
    store = row_store.create(folder, LEAVES)
    store.seal(0)
    states = {0: rows(store)}
    sealed = 0
    with monkeypatch.context() as patch:
      killed_at(patch, number)
      try:
        for step in (1, 2):
          change(store, rng)
          change(store, rng)
          states[step] = rows(store)
          store.seal(step)
          sealed = step
          store.forget_before(step - 1)
        store.undo()
        was_killed = False
      except Killed:
        was_killed = True
    store.close()
    possible = [max(0, sealed - 1), sealed]
    for kept in possible:
      reader = row_store.open_at(folder, kept)
      assert_equal(rows(reader), states[kept])
      reader.close()
    kept = possible[number % 2]
    again = row_store.open_at(folder, kept, is_private=False)
    assert_equal(rows(again), states[kept])
    again.verify()
    # And it goes on.
    change(again, rng)
    again.seal(kept + 1)
    again.close()
    if not was_killed:
      break
    number += 1
  assert number > 20


def test_a_kill_while_a_step_is_undone_is_undone_again(begun, rng, monkeypatch):
  folder, first = begun
  store = row_store.open_at(folder, 0, is_private=False)
  for step in (1, 2):
    change(store, rng)
    store.seal(step)
  change(store, rng)
  store.close()
  number, was_killed = 0, True
  while was_killed:
    with monkeypatch.context() as patch:
      killed_at(patch, number)
      try:
        row_store.open_at(folder, 0, is_private=False).close()
        was_killed = False
      except Killed:
        number += 1
    reader = row_store.open_at(folder, 0)
    assert_equal(rows(reader), first)
    reader.close()
  assert number > 5


def test_damage_is_named(begun, rng):
  folder, _ = begun
  path = folder / 'packed.rows'
  content = bytearray(path.read_bytes())
  content[100 * 12 + 5] ^= 1
  path.write_bytes(content)
  reader = row_store.open_at(folder, 0)
  with pytest.raises(UserError, match=r'packed.rows.*rows 0 to 199'):
    reader.verify()
  reader.close()
  path.write_bytes(content[:-1])
  with pytest.raises(UserError, match=r'packed.rows.*must have 2,400 bytes'):
    row_store.open_at(folder, 0)


def test_a_damaged_step_or_journal_is_named(begun, rng):
  folder, _ = begun
  store = row_store.open_at(folder, 0, is_private=False)
  change(store, rng)
  change(store, rng)
  store.close()
  path = folder / 'undo/0000000000'
  content = bytearray(path.read_bytes())
  content[200] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=r'undo/0000000000.*damaged'):
    row_store.open_at(folder, 0)
  path = folder / 'steps/0000000000.json'
  told = json.loads(path.read_text())
  told['leaves']['packed']['num_rows'] += 1
  path.write_text(json.dumps(told))
  with pytest.raises(UserError, match=r'0000000000.json.*damaged'):
    row_store.open_at(folder, 0)


def test_one_that_trains_needs_the_store_alone(begun):
  folder, _ = begun
  store = row_store.open_at(folder, 0, is_private=False)
  with pytest.raises(UserError, match='in use by another process'):
    row_store.open_at(folder, 0)
  store.close()
  readers = [row_store.open_at(folder, 0) for _ in range(2)]
  with pytest.raises(UserError, match='in use by another process'):
    row_store.open_at(folder, 0, is_private=False)
  array = readers[0].files['packed'].array()
  del readers
  with pytest.raises(UserError, match='in use by another process'):
    row_store.open_at(folder, 0, is_private=False)
  del array
  row_store.open_at(folder, 0, is_private=False).close()


def test_a_billion_rows_cost_nothing(tmp_path, rng):
  leaves = {'table': Leaf(10**9, 16, 'float32')}
  store = row_store.create(tmp_path, leaves)
  store.seal(0)
  array = store.files['table'].array()
  last = jnp.array([10**9 - 1, 0])
  read = jax.jit(lambda t, i: t.at[i].get(mode='promise_in_bounds'))
  assert not jax.block_until_ready(read(array, last)).any()
  ids, new = np.array([7, 10**9 - 1]), np.ones((2, 16), np.float32)
  old = store.files['table'].rows[ids]
  store.note([Before(ids, {'table': old})])
  store.write([Change(ids, {'table': new})])
  store.seal(1)
  store.verify()
  assert read(array, last)[:, 0].tolist() == [1, 0]
  assert store.files['table'].disk_bytes() <= 2**16
  assert [x.tolist() for x in store.touched('table')] == [[7, 10**9 - 1]]
  store.close()


def test_rows_are_shown_without_a_copy(tmp_path):
  for dtype in ('float32', 'bfloat16', 'int32', 'uint8'):
    path = tmp_path / dtype
    row_file.create(path, (100, 8), dtype)
    file = row_file.RowFile(path, (100, 8), dtype, is_private=False)
    array = file.array()
    assert array.unsafe_buffer_pointer() == file.rows.ctypes.data
    assert array.dtype == dtype
    file.rows[3] = 2
    assert float(array[3, 1]) == 2
    file.close()
