# SPDX-License-Identifier: Apache-2.0
"""A workdir becomes a quantized one, which the other commands read."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from commands import exit_code
from slot_models import MODELS
from small_run import save_untrained

import jaxsparse
from jaxsparse import mesh as mesh_lib
from jaxsparse.config.errors import UserError
from jaxsparse.data import tokenizer_roles
from jaxsparse.inference import quantized_leaves, weights
from jaxsparse.inference.quantize import Quantization, dequantized
from jaxsparse.run import checkpoint, new_workdir
from jaxsparse.run import workdir as workdir_lib

MODEL = dataclasses.replace(MODELS['small'], vocab_size=257)
HOW = Quantization(weights='int4', tables='int8')


@pytest.fixture(scope='module')
def old(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('old'), MODEL, deviation=0.3)


@pytest.fixture(scope='module')
def new(old, tmp_path_factory):
  folder = tmp_path_factory.mktemp('new') / 'int'
  argv = ['quantize', str(old), f'--out={folder}']
  assert exit_code([*argv, '--weights=int4', '--tables=int8']) == 0
  return folder


def equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_what_is_saved_is_what_quantizing_at_load_gives(old, new):
  _, saved = weights.load(new, MODEL)
  _, at_load = weights.load(old, MODEL, how=HOW)
  equal(saved, at_load)
  _, module_params = jaxsparse.load(new)
  equal(module_params, at_load)


def test_its_tokenizer_is_that_of_the_model(old, new):
  for name in (*workdir_lib.TOKENIZERS, *tokenizer_roles.FILES):
    before, after = old / name, new / name
    assert before.exists() == after.exists()
    assert not after.exists() or before.read_bytes() == after.read_bytes()


def test_its_tables_may_be_mapped_files(new):
  _, mapped = weights.load(new, MODEL, tables='file')
  equal(mapped, weights.load(new, MODEL)[1])
  file, *_ = (new / 'mapped_tables').rglob('value_table/stored.rows')
  assert file.stat().st_size > 0


def test_bytes_are_said_by_part_and_a_text_costs_bits(old, tmp_path, capsys):
  text = tmp_path / 'text.txt'
  text.write_text('So shaken as we are, so wan with care, ' * 3)
  argv = ['quantize', str(old), f'--out={tmp_path / "new"}', '--tables=int4']
  argv += ['--clip_search', '--weights=int4', f'--calibrate={text}']
  assert exit_code([*argv, f'--text={text}']) == 0
  said = capsys.readouterr().out
  rows = {line.split()[0]: line.split() for line in said.splitlines()}
  # 64 rows of 8 numbers, of which int4 has 4 bytes and 4 for the scale.
  assert float(rows['tables'][3]) == pytest.approx(16 / 32, abs=0.01)
  # Heads of 4 numbers are groups of 4 in the output, and 16 in the others.
  assert float(rows['attention'][-1]) < 0.3
  assert 'bits per byte before and' in said


def test_it_is_saved_again_to_the_same_bytes(new, tmp_path):
  _, params = quantized_leaves.load_params(new)
  plain, kinds = quantized_leaves.plain(params)
  (tmp_path / 'config.json').write_bytes((new / 'config.json').read_bytes())
  checkpoint.save_params(tmp_path, plain, dict(quantized=kinds))
  first, second = (
    checkpoint.load_params(folder)[1] for folder in (new, tmp_path)
  )
  equal(first, second)
  assert all(
    x.dtype in (np.uint8, np.int8, np.float32) for x in jax.tree.leaves(first)
  )
  record = checkpoint.read_record(new)
  assert record['quantized'] == json.loads(json.dumps(kinds))
  assert record[new_workdir.ORIGIN]['quantized']['weights'] == 'int4'


def test_it_generates_what_the_numbers_generate(old, new, capsys):
  argv = ['--prompt=To', '--max_tokens=8', '--temperature=0']
  assert exit_code(['generate', f'--workdir={new}', *argv]) == 0
  of_saved = capsys.readouterr().out
  flag = '--quantize=weights=int4,tables=int8'
  assert exit_code(['generate', f'--workdir={old}', flag, *argv]) == 0
  assert capsys.readouterr().out == of_saved


def test_it_is_evaluated_as_one_that_is_quantized_at_load(old, new, tmp_path):
  (tmp_path / 'book.txt').write_text('A cat sat on a mat. ' * 2)
  flags = [f'--text={tmp_path / "book.txt"}', '--batch-tokens=64']
  found = []
  for workdir, how in ((new, ''), (old, 'weights=int4,tables=int8')):
    out = tmp_path / workdir.name
    argv = [f'--workdir={workdir}', f'--quantize={how}', f'--output={out}']
    assert exit_code(['evaluate', *argv, *flags]) == 0
    (path,) = out.glob('*.json')
    found.append(json.loads(path.read_text()))
  assert found[0]['metrics'] == found[1]['metrics']
  assert found[1]['settings']['quantization']['weights'] == 'int4'
  assert 'quantization' not in found[0]['settings']


@pytest.mark.slow
def test_it_is_read_onto_a_mesh(old, new):
  """With a part of each row for every piece, though rows are saved in one."""
  _, whole = quantized_leaves.load_params(new)
  devices = mesh_lib.make_mesh(1, 4, 1, devices=jax.devices()[:4])
  _, split = weights.load(new, MODEL, devices=devices)
  table = split['block_00']['memory']['value_table']
  assert table.parts == 4
  assert table.stored.sharding.spec == jax.P(('data',), ('model', 'sparse'))
  equal(jax.device_get(dequantized(split)), jax.device_get(dequantized(whole)))


def test_a_mesh_that_cuts_groups_is_refused(new):
  devices = mesh_lib.make_mesh(1, 1, 2, devices=jax.devices()[:2])
  with pytest.raises(UserError, match='has 1 groups of numbers along its dim'):
    weights.load(new, MODEL, devices=devices)


def test_training_refuses_it(new, capsys):
  argv = [f'--workdir={new}', '--config.train.num_steps=1']
  assert exit_code(['train', *argv]) == 2
  assert 'is quantized, which no training goes on from' in (
    capsys.readouterr().err
  )


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'give --weights=, --tables= or both'),
    (['--weights=int5'], 'weights must be one of int8, int4, nf4'),
    (['--weights=int8', '--calibrate=x'], '--calibrate is for --weights=int4'),
    (['--tables=int8', '--clip_search'], 'clip_search is for tables=int4'),
  ],
)
def test_a_wrong_flag_is_one_sentence(old, tmp_path, flags, message, capsys):
  argv = ['quantize', str(old), f'--out={tmp_path / "new"}', *flags]
  assert exit_code(argv) == 2
  assert message in capsys.readouterr().err


def test_what_is_quantized_is_not_quantized_again(new, tmp_path, capsys):
  argv = ['quantize', str(new), f'--out={tmp_path / "new"}', '--weights=int8']
  assert exit_code(argv) == 2
  assert 'is quantized already' in capsys.readouterr().err
