"""Checkpoints: any mesh, damage noticed, full disks reported."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import checkpoint, mesh
from jaxsparse.errors import UserError

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


def record_of(step):
  return {'data': [1, {'lane': step}]}


def save(workdir, shape=(8, 1, 1), steps=(1,), keep=2):
  with jax.set_mesh(make_mesh(shape)):
    checkpoints = checkpoint.Checkpoints(workdir, keep)
    params, optimizer = jax.jit(make_state)()
    for step in steps:
      checkpoints.save(step, params, optimizer, record_of(step))
    checkpoints.close()


def restore(workdir, shape=(1, 1, 1), say=print):
  device_mesh = make_mesh(shape)
  abstract = mesh.abstract(make_state, mesh=device_mesh)
  with jax.set_mesh(device_mesh):
    return checkpoint.Checkpoints(workdir, 2).restore(*abstract, say)


def largest_file(folder):
  files = [p for p in pathlib.Path(folder).rglob('d/*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize('shape', SHAPES)
def test_restores_on_every_mesh(tmp_path, shape):
  save(tmp_path, (8, 1, 1))
  step, params, optimizer, record = restore(tmp_path, shape)
  expected, _ = make_state()
  assert (step, record) == (1, record_of(1))
  assert int(optimizer['step']) == 7
  assert params['kernel'].sharding.spec == jax.P('data', 'model')
  assert len(params['kernel'].sharding.device_set) == np.prod(shape)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_another_optimizer_is_no_damage(tmp_path):
  save(tmp_path)

  def with_more_state():
    params, optimizer = make_state()
    return params, optimizer | {'v': jnp.zeros(3)}

  abstract = jax.eval_shape(with_more_state)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  with pytest.raises(UserError, match='has 5 arrays where this run has 6'):
    checkpoints.restore(*abstract, print)
  assert checkpoints.steps() == [1]


def test_keeps_the_last_and_reads_params_alone(tmp_path):
  save(tmp_path, steps=(1, 2, 3))
  step, params = checkpoint.load_params(tmp_path)
  assert step == 3
  assert sorted(params) == ['half', 'kernel']
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
def test_damage_falls_back(tmp_path, damage, part):
  save(tmp_path, steps=(1, 2))
  DAMAGES[damage](largest_file(tmp_path / 'checkpoints' / '2' / part))
  said = []
  assert restore(tmp_path, say=said.append)[0] == 1
  assert len(said) == 1
  assert said[0].startswith('The checkpoint of step 2 is damaged (')
  assert (tmp_path / 'damaged' / '2').exists()
  # What was set aside no longer stands in the way of the same step.
  save(tmp_path, steps=(2,))
  assert restore(tmp_path)[0] == 2


def test_all_damaged_is_not_a_fresh_start(tmp_path):
  save(tmp_path, steps=(1, 2))
  for step in (1, 2):
    flip_bit(largest_file(tmp_path / 'checkpoints' / str(step) / 'params'))
  with pytest.raises(UserError, match='none of the checkpoints'):
    restore(tmp_path)


def change_digit(path):
  content = path.read_bytes()
  assert content.count(b'"lane": 2') == 1
  path.write_bytes(content.replace(b'"lane": 2', b'"lane": 3'))


RECORD_DAMAGES = {
  'a digit': change_digit,
  'empty': lambda p: p.write_bytes(b''),
  'cut short': lambda p: p.write_bytes(p.read_bytes()[:-5]),
  'not JSON': lambda p: p.write_bytes(b'\0' * 100),
  'missing': pathlib.Path.unlink,
}


@pytest.mark.parametrize('damage', RECORD_DAMAGES)
def test_a_damaged_record_falls_back(tmp_path, damage):
  save(tmp_path, steps=(1, 2))
  assert checkpoint.read_record(tmp_path) == record_of(2)
  RECORD_DAMAGES[damage](
    tmp_path / 'checkpoints' / '2' / '_CHECKPOINT_METADATA'
  )
  assert checkpoint.read_record(tmp_path) == record_of(1)
  said = []
  step, _, _, record = restore(tmp_path, say=said.append)
  assert (step, record) == (1, record_of(1))
  assert said[0].startswith('The checkpoint of step 2 is damaged (')


def test_no_record(tmp_path):
  assert checkpoint.read_record(tmp_path) is None
  (tmp_path / 'checkpoints').touch()
  assert checkpoint.read_record(tmp_path) is None


def test_too_little_disk_space(tmp_path):
  with pytest.raises(UserError, match='MiB free'):
    checkpoint.check_disk_space(tmp_path, 2**60)


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
