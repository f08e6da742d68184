# SPDX-License-Identifier: Apache-2.0
"""What goes out comes back to the bit, under others' names or ours."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from commands import exit_code
from imported import HF, NAMES, open_fixture, params_of, read
from lanes import few
from parameters import draw
from published import write_published
from safetensors.numpy import load_file

from jaxsparse.cli import convert_from_hf
from jaxsparse.config import (
  Config,
  DataConfig,
  DCMHAConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  SparseAttentionConfig,
  TableConfig,
)
from jaxsparse.config.errors import UserError
from jaxsparse.interop import exporting
from jaxsparse.nn.transformer import Transformer

IDS = dict(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
CLASSES = dict(
  llama='LlamaForCausalLM',
  llama_sharded_bf16='LlamaForCausalLM',
  llama3_rope='LlamaForCausalLM',
  mistral='MistralForCausalLM',
  qwen2='Qwen2ForCausalLM',
  qwen3='Qwen3ForCausalLM',
  olmo2='Olmo2ForCausalLM',
  mixtral='MixtralForCausalLM',
  olmoe='OlmoeForCausalLM',
  qwen3_moe='Qwen3MoeForCausalLM',
  gpt_neox='GPTNeoXForCausalLM',
)


def form_of(model, dtype='float32', length=64):
  config = Config(model=model, data=DataConfig(seq_len=length))
  return exporting.form_of(config, IDS, dtype)


def assert_equal(found, params):
  assert jax.tree.structure(found) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize('name', few(NAMES[:3] + NAMES[-2:], NAMES))
def test_round_trips_are_equal_to_the_bit(name, tmp_path):
  params, config = params_of(name), open_fixture(name).config
  form = form_of(config)
  assert form.name == CLASSES[name]
  exporting.write(params, form, tmp_path / 'x')
  file = tmp_path / 'x' / 'model.safetensors'
  if name != 'llama_sharded_bf16':
    assert file.read_bytes() == (HF / name / file.name).read_bytes()
  back = convert_from_hf.open_path(tmp_path / 'x')
  assert back.config == config
  assert back.length == 64
  assert_equal(read(back), params)


@pytest.mark.parametrize('name', NAMES)
def test_a_config_that_comes_back_is_the_same(name):
  opened = open_fixture(name)
  form = form_of(opened.config, length=opened.length)
  content = json.loads(form.config)
  assert form.name == CLASSES[name]
  assert {n: content[n] for n in IDS} == IDS
  theirs = json.loads((HF / name / 'config.json').read_text())
  # A null, and a limit of layers that nobody reads.
  skipped = {n for n, value in theirs.items() if value is None} | {*IDS}
  for field in content.keys() & theirs.keys() - skipped - {'dtype'}:
    if field != 'max_window_layers':
      assert content[field] == theirs[field], field


def test_many_files_with_an_index(tmp_path):
  params, config = params_of('llama'), open_fixture('llama').config
  form = form_of(config)
  exporting.write(params, form, tmp_path / 'x', file_bytes=40_000)
  files = sorted(path.name for path in (tmp_path / 'x').iterdir())
  assert files[1:-1] == [
    f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)
  ]
  index = json.loads((tmp_path / 'x' / files[-1]).read_text())
  assert index['metadata']['total_size'] == 4 * 26_272
  assert all((tmp_path / 'x' / f).stat().st_size < 42_000 for f in files[1:-1])
  assert_equal(read(convert_from_hf.open_path(tmp_path / 'x')), params)


def test_sixteen_bits_are_those_of_others(tmp_path):
  name = 'llama_sharded_bf16'
  form = form_of(open_fixture(name).config, 'bfloat16')
  exporting.write(params_of(name), form, tmp_path, 'bfloat16')
  found = load_file(tmp_path / 'model.safetensors')
  for file in (HF / name).glob('*.safetensors'):
    for tensor, value in load_file(file).items():
      assert found[tensor].dtype == value.dtype
      np.testing.assert_array_equal(found[tensor], value)
  assert (
    json.loads((tmp_path / 'config.json').read_text())['dtype'] == 'bfloat16'
  )


SMALL = dict(
  num_layers=2,
  model_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  vocab_size=40,
)
# Models that transformers has no class for.
OWN = dict(
  memory=dict(
    memory=MemoryConfig(num_keys=8, num_selected=2, placements=((0, 1),))
  ),
  narrow_tables=dict(
    memory=MemoryConfig(
      num_keys=8,
      num_selected=2,
      placements=((0, 1),),
      table=TableConfig(dtype='bfloat16'),
    )
  ),
  dcmha=dict(dcmha=DCMHAConfig()),
  sparse=dict(
    attention_pattern=('sparse',),
    sparse=SparseAttentionConfig(block=8, tile=8),
  ),
  shared=dict(moe=MoEConfig(num_experts=4, expert_dim=16, num_shared=1)),
  sigmoid=dict(moe=MoEConfig(num_experts=4, expert_dim=16, router='sigmoid')),
  uneven=dict(
    moe=MoEConfig(num_experts=4, expert_dim=16, normalize_weights=False)
  ),
  gelu=dict(mlp='gelu'),
  qk_epsilon=dict(qk_norm='head', qk_norm_epsilon=1e-3),
  parallel=dict(parallel_block=True),
  part_rotated=dict(rope_fraction=0.5),
  post=dict(norm_placement='post'),
)


@pytest.mark.parametrize('name', OWN)
def test_what_no_class_has_goes_out_as_our_own(name):
  form = form_of(ModelConfig(**(SMALL | OWN[name])))
  assert form.name == ''
  assert json.loads(form.config)['model']['num_layers'] == 2


@pytest.mark.parametrize('name', few(['narrow_tables'], list(OWN)[:4]))
def test_round_trips_under_our_names(name, tmp_path):
  model = ModelConfig(**(SMALL | OWN[name]))
  tokens = np.zeros((1, 8), np.int32)
  params = draw(Transformer(model).init, tokens)['params']
  exporting.write(params, form_of(model), tmp_path / 'x')
  names = load_file(tmp_path / 'x' / 'model.safetensors').keys()
  assert 'block_00/attention/query' in names
  back = convert_from_hf.open_path(tmp_path / 'x')
  assert back.config == model
  assert back.length == 64
  found = read(back)
  assert_equal(found, params)
  types = jax.tree.map(lambda x, y: x.dtype == y.dtype, found, params)
  assert all(jax.tree.leaves(types))


def test_what_training_alone_needs_is_no_matter():
  config = open_fixture('mixtral').config
  changed = dict(
    dropout_rate=0.1,
    init_deviations=(0.1, 0.1),
    query_chunk=8,
    use_remat=True,
    kv_cache='int8',
    dtype='bfloat16',
    mlp_dim=7,
  )
  moe = dataclasses.replace(config.moe, balance_loss_weight=0.5)
  model = dataclasses.replace(config, moe=moe, **changed)
  assert form_of(model).name == 'MixtralForCausalLM'


def test_a_number_that_does_not_fit(tmp_path):
  params = jax.tree.map(np.asarray, params_of('llama'))
  params['embed']['table'] = params['embed']['table'] * 1e6
  form = form_of(open_fixture('llama').config, 'float16')
  with pytest.raises(UserError, match='not finite in float16'):
    exporting.write(params, form, tmp_path / 'x', 'float16')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A folder of a Llama of one layer with a tokenizer, and its workdir."""
  folder = tmp_path_factory.mktemp('written')
  write_published(folder / 'in')
  argv = ['convert', 'from-hf', f'{folder}/in', f'--workdir={folder}/w']
  assert exit_code(argv) == 0
  return folder


def test_the_command_brings_all_of_it_out(written, capsys):
  out = written / 'out'
  argv = ['convert', 'to-hf', str(out), f'--workdir={written}/w']
  assert exit_code(argv) == 0
  assert 'step 0' in capsys.readouterr().out
  for name in ('model.safetensors', 'tokenizer.json', 'tokenizer_config.json'):
    assert (out / name).exists()
  modes = {path.stat().st_mode for path in out.iterdir()}
  assert len(modes) == 1, 'files are for the same readers'
  one, other = (written / n / 'model.safetensors' for n in ('in', 'out'))
  assert one.read_bytes() == other.read_bytes()
  config = json.loads((out / 'config.json').read_text())
  tokens = json.loads((out / 'tokenizer.json').read_text())['added_tokens']
  ids = {token['content']: token['id'] for token in tokens}
  assert config['eos_token_id'] == ids['<|endoftext|>']
  assert exit_code(argv) == 2
  assert 'must be new or an empty folder' in capsys.readouterr().err
