# SPDX-License-Identifier: Apache-2.0
"""Adapters beside trained models, whatever reads these."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import exit_code
from small_run import draw_params, save_untrained

import jaxsparse
from jaxsparse import config as c
from jaxsparse import mesh as mesh_lib
from jaxsparse.config import saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.inference import weights
from jaxsparse.inference.quantize import Quantization
from jaxsparse.nn import adapters as trees
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.run import adapter_files, checkpoint, stored

MODEL = c.ModelConfig(
  num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=16, vocab_size=257,
)  # fmt: skip
LORA = c.AdapterConfig(kind='lora', rank=2, targets='attention/|mlp/up')


def make_adapter(config=LORA, seed=1):
  """As training leaves one."""
  shapes = draw_params(MODEL)
  rng, found = np.random.default_rng(seed), {}
  for path, x in trees.targets(config, shapes).items():
    matrix = trees.adapted(config, path, x, a=None, b=None)
    for name, shape in matrix.of_dims(x.shape, config.rank, 1).items():
      if name != 'magnitude' or config.use_dora:
        array = rng.standard_normal(shape, np.float32)
        found['/'.join((*path, name))] = np.abs(array)
  return found


def save(folder, base, config=LORA, seed=1, **fields):
  meta = dict(kind='lora', base=base, steps=4, **config.to_json()) | fields
  adapter_files.write(folder, make_adapter(config, seed), meta)
  return folder


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('base'), MODEL, 0.3)


@pytest.fixture(scope='module')
def adapter(base, tmp_path_factory):
  fingerprint = stored.params_fingerprint(base, 3)
  return save(tmp_path_factory.mktemp('adapter'), fingerprint)


def by_hand(params, *, seed=1, scale=16.0):
  """What the query matrix is to be."""
  tensors = make_adapter(seed=seed)
  a, b = (tensors[f'block_00/attention/query/{x}'] for x in 'ab')
  w = np.asarray(params['block_00']['attention']['query'])
  return w + scale * np.tensordot(a, b, 1)


def query(params):
  return np.asarray(params['block_00']['attention']['query'])


def test_it_is_merged_where_the_model_is_of_floats(base, adapter):
  _, plain = weights.load(base, MODEL)
  expected = by_hand(plain)
  _, found = weights.load(base, MODEL, adapters=[adapter])
  np.testing.assert_allclose(query(found), expected, rtol=1e-5, atol=1e-5)
  assert jax.tree.structure(found) == jax.tree.structure(plain)
  for of_one in ([adapter], adapter, str(adapter)):
    _, loaded = jaxsparse.load(base, adapters=of_one)
    np.testing.assert_array_equal(query(loaded), query(found))
  narrow = dataclasses.replace(MODEL, dtype='bfloat16')
  _, cast = weights.load(base, narrow, adapters=[adapter])
  exact = query(found).astype(jnp.bfloat16)
  np.testing.assert_array_equal(query(cast), exact)


def test_several_are_added(base, adapter, tmp_path):
  other = save(tmp_path, stored.params_fingerprint(base, 3), seed=2)
  _, plain = weights.load(base, MODEL)
  _, found = weights.load(base, MODEL, adapters=[adapter, other])
  expected = by_hand(plain) + by_hand(plain, seed=2) - query(plain)
  np.testing.assert_allclose(query(found), expected, rtol=1e-4, atol=1e-4)


def test_it_stays_beside_a_quantized_matrix(base, adapter, tmp_path):
  how = Quantization(weights='int8')
  _, found = weights.load(base, MODEL, how=how, adapters=[adapter])
  matrix = found['block_00']['attention']['query']
  assert isinstance(matrix, AdaptedMatrix)
  _, plain = weights.load(base, MODEL, how=how)
  numbers = dict(plain)
  numbers = plain['block_00']['attention']['query'].dequantized()
  params = {'block_00': {'attention': {'query': numbers}}}
  np.testing.assert_allclose(
    matrix.merged(), by_hand(params), rtol=1e-5, atol=1e-5
  )
  fingerprint = stored.params_fingerprint(base, 3)
  other = save(tmp_path, fingerprint, seed=2)
  with pytest.raises(UserError, match='is quantized and has an adapter'):
    weights.load(base, MODEL, how=how, adapters=[adapter, other])


def test_on_a_mesh_it_lies_as_its_matrix(base, adapter):
  devices = mesh_lib.make_mesh(2, 1, 2, devices=jax.devices()[:4])
  _, alone = weights.load(base, MODEL, adapters=[adapter])
  _, found = weights.load(base, MODEL, devices=devices, adapters=[adapter])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    alone,
  )
  leaf = found['block_00']['attention']['query']
  assert leaf.sharding.spec == jax.P('data', 'model', None)


def renamed(tensors):
  return {name.replace('query', 'qury'): x for name, x in tensors.items()}


def without_b(tensors):
  return {n: x for n, x in tensors.items() if not n.endswith('up/b')}


def with_more(tensors):
  return tensors | {'block_00/attention/query/c': np.ones(1, np.float32)}


@pytest.mark.parametrize(
  ('change', 'fields', 'message'),
  [
    (dict, dict(base='another'), 'was trained beside other parameters'),
    (dict, dict(r=3), r'must have the shape .*, of rank 3, but has'),
    (renamed, {}, "'block_00/attention/qury', which is no matrix of this"),
    (without_b, {}, 'mlp/up/b of the adapter in .* but is missing'),
    (with_more, {}, "'block_00/attention/query/c', which no adapter of its"),
    (dict, dict(dropout=None), 'dropout must be a number, got None'),
  ],
)
def test_what_does_not_fit_is_refused(base, tmp_path, change, fields, message):
  meta = dict(
    kind='lora', base=stored.params_fingerprint(base, 3), **LORA.to_json()
  )
  adapter_files.write(tmp_path, change(make_adapter()), meta | fields)
  with pytest.raises(UserError, match=message):
    weights.load(base, MODEL, adapters=[tmp_path])


def save_run(folder, base, adapter=LORA):
  """A workdir as a run of an adapter leaves it."""
  folder.mkdir(exist_ok=True)
  save_untrained(folder, MODEL)
  shutil.rmtree(folder / 'checkpoints')
  config = c.Config(
    model=MODEL,
    data=c.DataConfig(seq_len=16, cache_dir=str(folder)),
    train=c.TrainConfig(start_from=str(base)),
    adapter=adapter,
  )
  text = saved_config.to_json(config)
  (folder / 'config.json').write_text(text)
  tensors = make_adapter(adapter)
  nested = {}
  for name, x in tensors.items():
    *owners, last = name.split('/')
    at = nested
    for owner in owners:
      at = at.setdefault(owner, {})
    at[last] = jnp.asarray(x)
  begun = dict(
    workdir=str(base), step=3, fingerprint=stored.params_fingerprint(base, 3)
  )
  record = {'config': text, 'start': begun}
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  checkpoints.save(5, nested, {'step': jnp.int32(5)}, record)
  checkpoints.close()
  return folder


def test_a_run_of_an_adapter_is_read_with_its_base(base, adapter, tmp_path):
  run = save_run(tmp_path, base)
  step, found = weights.load(run, MODEL)
  assert step == 5
  _, expected = weights.load(base, MODEL, adapters=[adapter])
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  _, loaded = jaxsparse.load(run)
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)
  with jax.set_mesh(mesh_lib.make_mesh(2, 1, 2, devices=jax.devices()[:4])):
    _, laid = jaxsparse.load(run)
    assert query(laid).shape == (8, 2, 4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    laid,
    expected,
  )


def test_the_base_of_a_quantized_run_is_quantized(base, tmp_path):
  of = dataclasses.replace(LORA, quantize='weights=nf4')
  _, found = weights.load(save_run(tmp_path, base, of), MODEL)
  matrix = found['block_00']['attention']['query']
  assert matrix.base.kind == 'nf4'
  assert found['block_00']['mlp']['down'].kind == 'nf4'


def test_a_base_that_is_gone_or_another_is_named(base, tmp_path):
  run, moved = save_run(tmp_path / 'run', base), tmp_path / 'moved'
  shutil.copytree(base, moved)
  begun = dict(workdir=str(tmp_path / 'none'), step=3, fingerprint='?')
  file = run / 'start.json'
  file.write_text(json.dumps(begun))
  with pytest.raises(UserError, match=r'adapter of step 3 .* not there: put'):
    weights.load(run, MODEL)
  file.write_text(json.dumps(begun | dict(workdir=str(moved))))
  with pytest.raises(UserError, match='which has other parameters by now'):
    weights.load(run, MODEL)
  fingerprint = stored.params_fingerprint(base, 3)
  begun |= dict(workdir=str(moved), fingerprint=fingerprint)
  file.write_text(json.dumps(begun))
  assert weights.load(run, MODEL)[0] == 5


def test_commands_take_an_adapter(base, adapter, tmp_path, capsys):
  """Those of a run and of its base with the adapter say the same."""
  run = save_run(tmp_path / 'run', base)
  flags = ['--prompt=a', '--max_tokens=4', '--temperature=0']
  said = []
  for place in (
    [f'--workdir={run}'],
    [f'--workdir={base}', f'--adapter={adapter}'],
    [f'--workdir={base}'],
  ):
    assert exit_code(['generate', *place, *flags]) == 0
    said.append(capsys.readouterr().out)
  assert said[0] == said[1] != said[2]
  other = save(tmp_path / 'other', 'of another')
  argv = ['generate', f'--workdir={base}', *flags, f'--adapter={other}']
  assert exit_code(argv) == 2
  assert 'or --force.' in capsys.readouterr().err
  assert exit_code([*argv, '--force']) == 0
  assert capsys.readouterr().out == said[0]


@pytest.mark.slow
def test_evaluations_are_of_their_adapter(base, adapter, tmp_path, capsys):
  text = tmp_path / 'text.txt'
  text.write_text('So shaken as we are, so wan with care, ' * 3)
  run = save_run(tmp_path / 'run', base)
  values = []
  for flags in (
    [f'--workdir={base}'],
    [f'--workdir={base}', f'--adapter={adapter}'],
    [f'--workdir={run}'],
  ):
    argv = ['evaluate', *flags, f'--text={text}']
    assert exit_code([*argv, f'--output={tmp_path / "out"}']) == 0
    values.append(capsys.readouterr().out.partition('task')[2])
  assert values[1] == values[2] != values[0]
