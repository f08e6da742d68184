# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints, and flags that are wrong, end in one sentence."""

import re

import ml_dtypes
import numpy as np
import pytest
from changed import (
  INDEX,
  WHOLE,
  assert_refused,
  gone,
  set_bytes,
  set_fields,
  set_index,
  set_tensors,
)
from commands import exit_code
from imported import HF

Q = 'model.layers.0.self_attn.q_proj.weight'
TABLE, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


def as_pickle(folder):
  (folder / WHOLE).rename(folder / 'pytorch_model.bin')


def untied(tensors):
  tensors[HEAD] = tensors[TABLE] + 1


# The checkpoint, what happens to it, and what the sentence must say.
CASES = {
  # The files.
  'no config': ('llama', gone('config.json'), 'has no config.json'),
  'no JSON': (
    'llama',
    set_bytes('config.json', lambda b: b[:40]),
    'is no JSON: it is cut off',
  ),
  'no text': (
    'llama',
    set_bytes('config.json', lambda b: b'\xff\xfe\x00'),
    'is no JSON',
  ),
  'no object': (
    'llama',
    set_bytes('config.json', lambda b: b'[1]'),
    'must hold a JSON object, got [1]',
  ),
  'no tensors': ('llama', gone(WHOLE), f'holds neither {WHOLE} nor'),
  'a pickle': ('llama', as_pickle, 'as pickles only (pytorch_model.bin)'),
  'cut off': (
    'llama',
    set_bytes(WHOLE, lambda b: b[:50_000]),
    "can't be read as safetensors",
  ),
  'cut off early': (
    'llama',
    set_bytes(WHOLE, lambda b: b[:5]),
    "can't be read as safetensors",
  ),
  'empty': (
    'llama',
    set_bytes(WHOLE, lambda b: b''),
    "can't be read as safetensors",
  ),
  'a page of the web': (
    'llama',
    set_bytes(WHOLE, lambda b: b'<html>No access</html>' * 9),
    "can't be read as safetensors",
  ),
  'a pointer of git': (
    'llama',
    set_bytes(WHOLE, lambda b: b'version https://git-lfs.github.com/spec/v1'),
    "can't be read as safetensors",
  ),
  'a missing shard': (
    'llama_sharded_bf16',
    gone('model-00002-of-00003.safetensors'),
    'names model-00002-of-00003.safetensors, but',
  ),
  'a shard cut off': (
    'llama_sharded_bf16',
    set_bytes('model-00002-of-00003.safetensors', lambda b: b[:9000]),
    "can't be read as safetensors",
  ),
  'an index of another name': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update({TABLE: 'other.safetensors'})),
    'names other.safetensors, but',
  ),
  'an index that leads away': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update({TABLE: '../llama/' + WHOLE})),
    'gives each tensor a file beside it',
  ),
  'an index of too much': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update(more=names[TABLE])),
    'names tensors that no file',
  ),
  'an index of another file': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update({TABLE: max(names.values())})),
    f'holds {TABLE}, which',
  ),
  'an index that is none': (
    'llama_sharded_bf16',
    set_bytes(INDEX, lambda b: b'{"weight_map": 3}'),
    'must be a JSON object whose weight_map',
  ),
  # The tensors.
  'a missing tensor': (
    'llama',
    set_tensors(lambda t: t.pop(Q)),
    f'the checkpoint lacks {Q}, so',
  ),
  'many missing tensors': (
    'llama',
    set_tensors(lambda t: [t.pop(n) for n in list(t) if 'mlp' in n]),
    'up_proj.weight and 1 more',
  ),
  'an extra tensor': (
    'llama',
    set_tensors(lambda t: t.update(more=t[Q])),
    'the checkpoint also holds more, so',
  ),
  'other names': (
    'llama',
    set_tensors(lambda t: t.update({Q + 's': t.pop(Q)})),
    f'lacks {Q} and also holds {Q}s, so',
  ),
  'biases that the config does not know': (
    'llama',
    set_tensors(lambda t: t.update({Q.replace('weight', 'bias'): t[Q][0]})),
    'q_proj.bias',
  ),
  'a wrong shape': (
    'llama',
    set_tensors(lambda t: t.update({Q: t[Q][:-1]})),
    f'{Q} must have the shape [32, 32] by the config, but has [31, 32]',
  ),
  'another vocabulary': (
    'llama',
    set_fields(vocab_size=97),
    f'{TABLE} must have the shape [97, 32]',
  ),
  'another head_dim': (
    'llama',
    set_fields(head_dim=16),
    f'{Q} must have the shape [64, 32]',
  ),
  'whole numbers': (
    'llama',
    set_tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})),
    'is of I8: give the checkpoint that is not quantized',
  ),
  'eight bits': (
    'llama',
    set_tensors(lambda t: t.update({Q: t[Q].astype(ml_dtypes.float8_e4m3fn)})),
    'is of F8_E4M3: give the checkpoint that is not quantized',
  ),
  'no number': (
    'llama',
    set_tensors(lambda t: t[Q].fill(np.nan)),
    f'{Q} holds what is not a finite number',
  ),
  'infinity': (
    'mixtral',
    set_tensors(
      lambda t: t['model.layers.1.block_sparse_moe.experts.2.w1.weight'].fill(
        np.inf
      )
    ),
    'experts.2.w1.weight holds what is not a finite number',
  ),
  'a head that is not the tied table': (
    'qwen2',
    set_tensors(untied),
    f'{HEAD} differs from {TABLE}',
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_one_sentence(name, tmp_path, capsys):
  assert_refused(*CASES[name], tmp_path, capsys)


def test_there_is_no_such_folder(tmp_path, capsys):
  (tmp_path / 'file').touch()
  for path, said in (('none', 'there is no'), ('file', 'must be a folder')):
    argv = ['convert', 'from-hf', str(tmp_path / path), '--workdir=never']
    assert exit_code(argv) == 2
    assert said in capsys.readouterr().err


def test_a_workdir_that_is_in_use(tmp_path, capsys):
  (tmp_path / 'file').touch()
  argv = ['convert', 'from-hf', str(HF / 'llama'), f'--workdir={tmp_path}']
  assert exit_code(argv) == 2
  assert 'must be new or an empty folder' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('argv', 'said'),
  [
    (['from-fh', 'x'], "'from-fh' (did you mean from-hf?)"),
    (['from-hf'], 'the following arguments are required: path'),
    (['from-hf', 'x'], '--workdir'),
    (['from-hf', 'x', '--workdir=w', '--dtype=int8'], 'int8'),
    (['to-hf', 'x'], '--workdir'),
    (['to-hf', 'x', '--workdir=nowhere'], 'holds no config.json'),
  ],
)
def test_flags(argv, said, capsys):
  assert exit_code(['convert', *argv]) == 2
  error = capsys.readouterr().err
  assert re.fullmatch(r'error: [^\n]+\.\n', error), error
  assert said in error
