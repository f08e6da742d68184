# SPDX-License-Identifier: Apache-2.0
"""Adapters in the files of peft: bytes written here, as peft writes them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import exit_code
from imported import HF, expected, open_fixture, params_of, read
from safetensors.numpy import load_file, save_file

import jaxsparse
from jaxsparse.cli import convert_from_hf
from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import UserError
from jaxsparse.interop import our_leaves, peft
from jaxsparse.nn import adapters
from jaxsparse.run import adapter_files

R = 2


def theirs(name, folder, suffixes, **settings):
  """A folder of peft, and what it makes of each weight of the model."""
  rng = np.random.default_rng(0)
  config = dict(
    peft_type='LORA', task_type='CAUSAL_LM', r=R, lora_alpha=3,
    lora_dropout=0.1, target_modules=list(suffixes), bias='none',
    fan_in_fan_out=False, use_rslora=False, use_dora=False,
    modules_to_save=None, rank_pattern={}, alpha_pattern={},
    base_model_name_or_path='somewhere', inference_mode=True,
  ) | settings  # fmt: skip
  weights = load_file(HF / name / 'model.safetensors')
  tensors, changed = {}, dict(weights)
  for key, w in weights.items():
    module = key.removesuffix('.weight')
    if module.rpartition('.')[2] not in suffixes:
      continue
    a = rng.standard_normal((R, w.shape[1]), np.float32)
    b = rng.standard_normal((w.shape[0], R), np.float32)
    scale = 3 / (R**0.5 if config['use_rslora'] else R)
    new = w + scale * b @ a
    begin = f'base_model.model.{module}'
    tensors |= {f'{begin}.lora_A.weight': a, f'{begin}.lora_B.weight': b}
    if config['use_dora']:
      m = np.abs(rng.standard_normal(w.shape[0], np.float32))
      new *= (m / np.linalg.norm(new, axis=1))[:, None]
      tensors[f'{begin}.lora_magnitude_vector'] = m
    changed[key] = new
  folder.mkdir(exist_ok=True)
  save_file(tensors, folder / peft.TENSORS)
  (folder / peft.CONFIG).write_text(json.dumps(config))
  return tensors, changed


def leaves_of(name, weights):
  layout = open_fixture(name).layout
  return {
    path: leaf.to_ours([part.of(weights[part.name]) for part in leaf.sources])
    for path, leaf in layout.items()
  }


CASES = [
  ('llama', ('q_proj', 'v_proj'), {}),
  ('llama', ('o_proj', 'up_proj', 'down_proj'), dict(use_rslora=True)),
  ('qwen3', ('q_proj', 'k_proj', 'o_proj'), dict(use_dora=True)),
]


@pytest.mark.parametrize(('name', 'suffixes', 'settings'), CASES)
def test_weights_are_those_of_peft(name, suffixes, settings, tmp_path):
  tensors, changed = theirs(name, tmp_path / 'peft', suffixes, **settings)
  layout = open_fixture(name).layout
  config, ours = peft.read(tmp_path / 'peft', layout)
  tree = our_leaves.nested(dict(ours))
  params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params_of(name))
  joined = adapters.joined(config, params, tree)
  merged = our_leaves.flat(adapters.merged(joined))
  for path, leaf in leaves_of(name, changed).items():
    found = np.asarray(merged[path])
    np.testing.assert_allclose(found, leaf, rtol=2e-5, atol=2e-5)
  # And out again, to the bit.
  peft.write(tmp_path / 'back', config, ours, layout)
  back = load_file(tmp_path / 'back' / peft.TENSORS)
  assert back.keys() == tensors.keys()
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(back[key], tensor)
  said = json.loads((tmp_path / 'back' / peft.CONFIG).read_text())
  before = json.loads((tmp_path / 'peft' / peft.CONFIG).read_text())
  assert sorted(said['target_modules']) == sorted(suffixes)
  for key in ('r', 'lora_alpha', 'lora_dropout', 'use_dora', 'use_rslora'):
    assert said[key] == before[key]


def test_modules_are_named_one_by_one_where_not_all_are_meant(tmp_path):
  layout = open_fixture('llama').layout
  theirs('llama', tmp_path / 'peft', ('q_proj',))
  config, ours = peft.read(tmp_path / 'peft', layout)
  first = {k: x for k, x in ours.items() if k.startswith('block_00')}
  peft.write(tmp_path / 'back', config, first, layout)
  said = json.loads((tmp_path / 'back' / peft.CONFIG).read_text())
  assert said['target_modules'] == ['model.layers.0.self_attn.q_proj']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(peft_type='IA3'), "peft_type must be LORA in .*, got 'IA3'"),
    (dict(rank_pattern={'q_proj': 4}), 'rank_pattern = .* is not supported'),
    (dict(init_lora_weights='pissa'), "= 'pissa' in .* began from other weig"),
    (dict(bias='all'), "bias = 'all' in .* is not supported"),
    (dict(r=3), r'must have the shape \[3, \d+\], of r = 3, but has \[2'),
    (dict(r='much'), 'must be a JSON object with the settings r and'),
    ('unknown', r'holds .*q_bias.* for which this model has no matrix'),
    ('nan', 'holds what is not a finite number'),
    ('cut', "can't be read as safetensors"),
    ('bin', r'pickles \(adapter_model.bin\) are not read'),
    ('none', 'holds no adapter_config.json'),
  ],
)
def test_what_is_wrong_is_said_in_a_sentence(change, message, tmp_path):
  settings = change if isinstance(change, dict) else {}
  tensors, _ = theirs('llama', tmp_path, ('q_proj',), **settings)
  file = tmp_path / peft.TENSORS
  first = next(iter(tensors))
  if change == 'unknown':
    save_file({first.replace('q_proj', 'q_bias'): tensors[first]}, file)
  if change == 'nan':
    save_file({first: np.full_like(tensors[first], np.nan)}, file)
  if change == 'cut':
    file.write_bytes(file.read_bytes()[:-9])
  if change == 'bin':
    file.rename(file.with_suffix('.bin'))
  if change == 'none':
    (tmp_path / peft.CONFIG).unlink()
  with pytest.raises(UserError, match=message):
    peft.read(tmp_path, open_fixture('llama').layout)


def test_fused_matrices_are_refused(tmp_path):
  tensors = {'block_00/attention/query/a': np.zeros((8, R), np.float32)}
  config = AdapterConfig(kind='lora', rank=R)
  layout = open_fixture('gpt_neox').layout
  assert 'block_00/mlp/up' in peft.modules(layout)
  with pytest.raises(UserError, match='is not the whole weight of a module'):
    peft.write(tmp_path, config, tensors, layout)


def refuse_another_base(base, run, folder, capsys):
  tensors, meta = adapter_files.read(run)
  adapter_files.write(folder / 'other', tensors, meta | dict(base='0' * 64))
  argv = ['convert', 'to-peft', str(folder / 'forced'), f'--workdir={base}',
          f'--adapter={folder / "other"}']  # fmt: skip
  capsys.readouterr()
  assert exit_code(argv) == 2
  assert 'was trained beside other parameters' in capsys.readouterr().err
  assert exit_code([*argv, '--force']) == 0


def test_an_exported_model_is_the_merged_one(tmp_path, capsys):
  """By commands: import, adapter in and out, and the merged model."""
  base, run = tmp_path / 'base', tmp_path / 'adapter'
  tensors, changed = theirs('llama', tmp_path / 'peft', ('q_proj', 'v_proj'))
  for argv in (
    ['from-hf', str(HF / 'llama'), f'--workdir={base}'],
    ['from-peft', str(tmp_path / 'peft'), f'--workdir={base}', f'--out={run}'],
    ['to-peft', str(tmp_path / 'back'), f'--workdir={base}',
     f'--adapter={run}'],
    ['to-hf', str(tmp_path / 'hf'), f'--workdir={base}', f'--adapter={run}'],
  ):  # fmt: skip
    assert exit_code(['convert', *argv]) == 0
  refuse_another_base(base, run, tmp_path, capsys)
  back = load_file(tmp_path / 'back' / peft.TENSORS)
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(back[key], tensor)
  merged = load_file(tmp_path / 'hf' / 'model.safetensors')
  for key, tensor in changed.items():
    np.testing.assert_allclose(merged[key], tensor, rtol=2e-5, atol=2e-5)
  # What is read from there gives the logits of the adapter beside its base.
  exported = convert_from_hf.open_path(tmp_path / 'hf')
  module, params = jaxsparse.load(base, adapters=[run])
  ids = jnp.asarray(expected('llama')[0])
  logits = jax.jit(module.apply)
  np.testing.assert_array_equal(
    logits({'params': params}, ids),
    logits({'params': jax.device_get(read(exported))}, ids),
  )
