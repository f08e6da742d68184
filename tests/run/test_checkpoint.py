# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: any mesh, damage noticed, full disks reported."""

import functools
import gc
import json
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, disk, fingerprints

SHAPES = [(8, 1, 1), (1, 1, 1), (2, 1, 4)]


def make_mesh(shape):
  count = shape[0] * shape[1] * shape[2]
  return mesh.make_mesh(*shape, devices=jax.devices()[:count])


def make_state():
  normal = jax.random.normal(jax.random.key(0), (64, 32))
  params = {
    'kernel': mesh.reshard(normal, mesh.param('DF')),
    'half': jnp.full(3, 1.5, jnp.bfloat16),
  }
  return params, {
    'step': jnp.int32(7),
    'm': jax.tree.map(jnp.ones_like, params),
  }


@functools.cache
def state():
  """Compiled once, on no mesh."""
  return jax.jit(make_state)()


def record_of(step):
  return {'data': [1, {'lane': step}]}


def save(workdir, shape=(8, 1, 1), steps=(1,), keep=2):
  with jax.set_mesh(make_mesh(shape)):
    checkpoints = checkpoint.Checkpoints(workdir, keep)
    params, optimizer = jax.jit(make_state)()
    for step in steps:
      checkpoints.save(step, params, optimizer, record_of(step))
    checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Checkpoints of two steps; only to be read."""
  folder = tmp_path_factory.mktemp('saved')
  save(folder, steps=(1, 2))
  return folder


@pytest.fixture
def two_steps(saved, tmp_path):
  """A copy of them that a test may change."""
  return shutil.copytree(saved, tmp_path / 'copy')


def restore(workdir, shape=(1, 1, 1), say=print):
  device_mesh = make_mesh(shape)
  abstract = mesh.abstract(make_state, mesh=device_mesh)
  with jax.set_mesh(device_mesh):
    return checkpoint.Checkpoints(workdir, 2).restore(*abstract, say)


def largest_file(folder):
  files = [p for p in pathlib.Path(folder).rglob('d/*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize('shape', SHAPES)
def test_restores_on_every_mesh(saved, shape):
  step, params, optimizer, record = restore(saved, shape)
  expected, _ = state()
  assert (step, record) == (2, record_of(2))
  assert int(optimizer['step']) == 7
  assert params['kernel'].sharding.spec == jax.P('data', 'model')
  assert len(params['kernel'].sharding.device_set) == np.prod(shape)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_params_are_read_whole_where_a_mesh_is_in_use(saved):
  expected, _ = state()
  with jax.set_mesh(make_mesh((2, 2, 2))):
    _, params = checkpoint.load_params(saved)
    assert params['kernel'].sharding.is_fully_replicated
    assert len(params['kernel'].sharding.device_set) == 8
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_another_optimizer_is_no_damage(two_steps):
  def with_more_state():
    params, optimizer = make_state()
    return params, optimizer | {'v': jnp.zeros(3)}

  abstract = jax.eval_shape(with_more_state)
  checkpoints = checkpoint.Checkpoints(two_steps, 2)
  with pytest.raises(UserError, match='has 5 arrays where this run has 6'):
    checkpoints.restore(*abstract, print)
  assert checkpoints.steps() == [1, 2]


def test_keeps_the_last_and_reads_params_alone(tmp_path):
  save(tmp_path, steps=(1, 2, 3))
  step, params = checkpoint.load_params(tmp_path)
  assert step == 3
  assert sorted(params) == ['half', 'kernel']
  assert checkpoint.read_record(tmp_path) == record_of(3)
  with pytest.raises(UserError, match=r'no checkpoint of step 1.*\[2, 3\]'):
    checkpoint.load_params(tmp_path, 1)


def test_relative_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save('here')
  assert restore('here')[0] == 1
  assert checkpoint.load_params('here')[0] == 1


def test_nothing_to_restore(tmp_path):
  assert restore(tmp_path) is None


def flip_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGES = {
  'flipped bit': flip_bit,
  'cut short': lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
  'missing': pathlib.Path.unlink,
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('part', ['params', 'optimizer'])
def test_damage_falls_back(two_steps, damage, part):
  DAMAGES[damage](largest_file(two_steps / 'checkpoints' / '2' / part))
  said = []
  assert restore(two_steps, say=said.append)[0] == 1
  assert len(said) == 1
  assert said[0].startswith('The checkpoint of step 2 is damaged (')
  assert (two_steps / 'damaged' / '2').exists()
  # What was set aside no longer stands in the way of the same step.
  save(two_steps, steps=(2,))
  assert restore(two_steps)[0] == 2


def contents(folder):
  return {
    path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
    for path in pathlib.Path(folder).rglob('*')
  }


@pytest.mark.parametrize('damage', DAMAGES)
def test_params_are_checked_when_loaded_for_use(two_steps, damage):
  DAMAGES[damage](largest_file(two_steps / 'checkpoints' / '2' / 'params'))
  older = largest_file(two_steps / 'checkpoints' / '1' / 'params')
  before, said = contents(two_steps), []
  step, params = checkpoint.load_params(two_steps, say=said.append)
  assert step == 1
  jax.tree.map(np.testing.assert_array_equal, params, state()[0])
  assert len(said) == 1
  assert said[0].startswith('The checkpoint of step 2 is damaged (')
  with pytest.raises(
    UserError, match=r'of step 2 .* choose another step of \[1, 2'
  ):
    checkpoint.load_params(two_steps, 2)
  assert contents(two_steps) == before
  DAMAGES[damage](older)
  with pytest.raises(UserError, match='none of the checkpoints'):
    checkpoint.load_params(two_steps, say=said.append)


DAMAGES_OF_ANY = DAMAGES | {
  'empty': lambda p: p.write_bytes(b''),
  'of zeros': lambda p: p.write_bytes(bytes(p.stat().st_size)),
}


@pytest.mark.slow
@pytest.mark.parametrize('damage', DAMAGES_OF_ANY)
def test_any_file_may_be_damaged(tmp_path, damage):
  """What is read is bit for bit one of the two that were saved."""
  save(tmp_path / 'whole', steps=(1, 2))
  expected, optimizer = state()
  newest = tmp_path / 'whole' / 'checkpoints' / '2'
  files = sorted(p for p in newest.rglob('*') if p.is_file())
  assert len(files) > 10
  for file in files:
    shutil.rmtree(tmp_path / 'hurt', ignore_errors=True)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'hurt')
    hurt = tmp_path / 'hurt' / file.relative_to(tmp_path / 'whole')
    if not hurt.stat().st_size:
      continue
    DAMAGES_OF_ANY[damage](hurt)
    step, params = checkpoint.load_params(tmp_path / 'hurt', say=str)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert step == 2 or 'optimizer' not in hurt.parts
    found, *arrays, record = restore(tmp_path / 'hurt', say=str)
    assert record == record_of(found)
    jax.tree.map(np.testing.assert_array_equal, arrays, [expected, optimizer])


def as_older(folder):
  """Rewrites a checkpoint's metadata as jaxsparse did before August 2026."""
  path = folder / '_CHECKPOINT_METADATA'
  metadata = json.loads(path.read_text())
  params, optimizer = state()
  metadata['custom_metadata'] = {
    'fingerprints': fingerprints.sums(
      {'params': params, 'optimizer': optimizer}
    ),
    'record': {'data': 5},
  }
  path.write_text(json.dumps(metadata))


def test_older_checkpoints(two_steps):
  for step in (1, 2):
    as_older(two_steps / 'checkpoints' / str(step))
  assert checkpoint.load_params(two_steps)[0] == 2
  assert restore(two_steps)[::3] == (2, {'data': 5})
  assert checkpoint.read_record(two_steps) == {'data': 5}
  flip_bit(largest_file(two_steps / 'checkpoints' / '2' / 'params'))
  assert checkpoint.load_params(two_steps)[0] == 1
  assert restore(two_steps)[0] == 1


def test_all_damaged_is_not_a_fresh_start(two_steps):
  for step in (1, 2):
    flip_bit(largest_file(two_steps / 'checkpoints' / str(step) / 'params'))
  with pytest.raises(UserError, match='none of the checkpoints'):
    restore(two_steps)


def change_digit(path):
  content = path.read_bytes()
  assert content.count(b'"lane": 2') == 1
  path.write_bytes(content.replace(b'"lane": 2', b'"lane": 3'))


RECORD_DAMAGES = {
  'a digit': change_digit,
  'empty': lambda p: p.write_bytes(b''),
  'cut short': lambda p: p.write_bytes(p.read_bytes()[:-5]),
  'of another kind': lambda p: p.write_bytes(b'[1, 2]'),
  'not JSON': lambda p: p.write_bytes(b'\0' * 100),
  'missing': pathlib.Path.unlink,
}


@pytest.mark.parametrize('damage', RECORD_DAMAGES)
def test_a_damaged_record_falls_back(two_steps, damage):
  assert checkpoint.read_record(two_steps) == record_of(2)
  RECORD_DAMAGES[damage](
    two_steps / 'checkpoints' / '2' / '_CHECKPOINT_METADATA'
  )
  assert checkpoint.read_record(two_steps) == record_of(1)
  said = []
  step, _, _, record = restore(two_steps, say=said.append)
  assert (step, record) == (1, record_of(1))
  assert said[0].startswith('The checkpoint of step 2 is damaged (')


def test_damage_of_an_older_step_stops_no_save(two_steps):
  for name in ('1', '2'):
    metadata = two_steps / 'checkpoints' / name / '_CHECKPOINT_METADATA'
    metadata.write_text('[]')
  save(two_steps, steps=(3, 4, 5))
  assert checkpoint.load_params(two_steps)[0] == 5


def test_what_a_killed_save_left_is_removed(tmp_path):
  save(tmp_path)
  left = tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp'
  left.mkdir()
  save(tmp_path, steps=(2,))
  assert not left.exists()
  assert checkpoint.load_params(tmp_path)[0] == 2


def test_arrays_may_be_overwritten_after_save(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, 1)
  overwrite = jax.jit(lambda x: x * 0, donate_argnums=0)
  x = jnp.arange(1 << 20)
  checkpoints.save(1, {'x': x}, {'step': jnp.int32(1)}, {})
  assert not overwrite(x).any()
  checkpoints.close()
  _, params = checkpoint.load_params(tmp_path)
  np.testing.assert_array_equal(params['x'], np.arange(1 << 20))


def test_deleted_between_saves(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  for step in range(1, 5):
    checkpoints.save(step, *state(), {})
    checkpoints.wait()
    if step == 3:
      shutil.rmtree(tmp_path / 'checkpoints')
  checkpoints.close()
  assert checkpoint.load_params(tmp_path)[0] == 4


def test_deleted_while_it_is_written(tmp_path, monkeypatch):
  class Failing:
    """What Orbax raises when its folder is gone is no OSError."""

    def result(self):
      raise ValueError('No ArrayMetadata found')

  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  start = checkpoint.ocp.save_checkpointables_async
  monkeypatch.setattr(
    checkpoint.ocp, 'save_checkpointables_async', lambda *_, **__: Failing()
  )
  checkpoints.save(1, *state(), {})
  with pytest.raises(UserError, match='step 1 was deleted'):
    checkpoints.wait()
  checkpoints.save(2, *state(), {})
  monkeypatch.setattr(checkpoint.ocp, 'save_checkpointables_async', start)
  checkpoints.save(3, *state(), {})
  assert checkpoints.steps() == [3]
  checkpoints.close()
  assert checkpoint.load_params(tmp_path)[0] == 3


def test_a_file_in_place_of_the_folder(tmp_path):
  (tmp_path / 'checkpoints').touch()
  with pytest.raises(UserError, match="checkpoints' is a file where"):
    checkpoint.Checkpoints(tmp_path, 2)
  with pytest.raises(UserError, match='no checkpoints yet'):
    checkpoint.load_params(tmp_path)


@pytest.mark.parametrize(
  'count', [16, pytest.param(160, marks=pytest.mark.slow)]
)
def test_saves_leave_no_threads_and_descriptors_behind(tmp_path, count):
  def used():
    checkpoints.wait()  # A save that is under way holds files open.
    gc.collect()  # Orbax's event loops hold three descriptors each until then.
    folders = [pathlib.Path('/proc/self', kind) for kind in ('fd', 'task')]
    return [len(list(folder.iterdir())) for folder in folders]

  checkpoints = checkpoint.Checkpoints(tmp_path, 1)
  for step in range(count * 5 // 4):
    checkpoints.save(step, *state(), {})
    if step == count // 4:
      before = used()
  after = used()
  checkpoints.close()
  # A thread more for each save would be three descriptors more, too.
  assert np.subtract(after, before).max() < count


def test_keeps_the_best_beside_the_newest(tmp_path):
  losses = {1: 4.0, 2: 2.0, 3: math.nan, 4: 3.0, 5: 5.0, 6: 2.5}

  def run(steps, keep_best):
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, keep_best)
    for step, loss in losses.items():
      if step < steps[0]:
        checkpoints.note_loss(step, loss)
    for step in steps:
      checkpoints.save(step, *state(), {})
      checkpoints.note_loss(step, losses[step])
    checkpoints.close()
    return checkpoint.stored.steps_in(tmp_path)

  assert run([1, 2, 3], 1) == [2, 3]
  # A restart that is told the losses again goes on as if it were none.
  assert run([4, 5], 1) == [2, 5]
  assert run([6], 2) == [2, 6]
  assert checkpoint.best_step(tmp_path, losses) == 2
  with pytest.raises(UserError, match='has a validation loss'):
    checkpoint.best_step(tmp_path, {1: 4.0})
  checkpoints = checkpoint.Checkpoints(tmp_path, 1, 2)
  for step, loss in losses.items():
    checkpoints.note_loss(step, loss)
  assert [s for s in losses if checkpoints.is_among_best(s)] == [2, 6]
  checkpoints.close()


def test_no_record(tmp_path):
  assert checkpoint.read_record(tmp_path) is None
  (tmp_path / 'checkpoints').touch()
  assert checkpoint.read_record(tmp_path) is None


def test_too_little_disk_space(tmp_path):
  with pytest.raises(UserError, match='MiB free'):
    disk.check_disk_space(tmp_path, 2**60)


@pytest.mark.skipif(os.geteuid() != 0, reason='mounting needs root')
def test_full_disk(tmp_path):
  """A file system that fills up while a checkpoint is written."""
  if os.system(f'mount -t tmpfs -o size=16k tmpfs {tmp_path} 2>/dev/null'):
    pytest.skip('this machine does not let tests mount a file system')
  try:
    with pytest.raises(UserError, match='could not be written'):
      save(tmp_path)
  finally:
    os.system(f'umount {tmp_path}')


@pytest.mark.skipif(os.geteuid() != 0, reason='mounting needs root')
def test_full_disk_takes_no_older_checkpoint(tmp_path):
  if os.system(f'mount -t tmpfs -o size=200k tmpfs {tmp_path} 2>/dev/null'):
    pytest.skip('this machine does not let tests mount a file system')
  try:
    save(tmp_path, keep=1)
    checkpoints = checkpoint.Checkpoints(tmp_path, 1)
    (tmp_path / 'filler').write_bytes(bytes(2**17))
    checkpoints.save(2, *state(), {})
    with pytest.raises(UserError, match='could not be written'):
      checkpoints.save(3, *state(), {})
    assert checkpoints.steps() == [1]
    checkpoints.close()
    assert checkpoint.load_params(tmp_path)[0] == 1
  finally:
    os.system(f'umount {tmp_path}')
