# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxsparse cost`."""

import time

import pytest
from recipes import CONFIGS

from jaxsparse.cli import cost
from jaxsparse.config.errors import UserError


def test_prints_parameters_flops_and_bytes(capsys):
  path = CONFIGS / 'ultramem.py:1b6'
  cost.main([f'--config={path}', '--batch_sizes=1,64'])
  out = capsys.readouterr().out
  assert 'as papers count: 21,391,' in out
  assert '3.499 GFLOPs' in out
  # 64 sequences of 84 rows of 1,024 values in 6 layers, 2 bytes each.
  assert f'{64 * 84 * 1024 * 6 * 2 / 1e9:.4g}' in out


def test_fields_are_overridden_as_in_training(capsys):
  """Two heads of keys and values for sixteen of queries: an eighth of both."""
  flags = [f'--config={CONFIGS / "ultramem.py:1b6"}', '--batch_sizes=64']
  caches = []
  for overrides in [], ['--config.model.num_kv_heads=2']:
    cost.main(flags + overrides)
    last = capsys.readouterr().out.splitlines()[-1].split()
    caches.append(float(last[4]))
  assert caches[0] == pytest.approx(8 * caches[1], rel=1e-3)


def test_as_many_blocks_as_there_may_be_take_no_time(capsys):
  """Each costs the same: as if there was one, ten thousand times."""
  flags = [f'--config={CONFIGS / "sparse_attention.py:tiny"}']
  start = time.monotonic()
  cost.main([*flags, '--config.model.num_layers=10000'])
  assert time.monotonic() - start < 5
  assert 'total' in capsys.readouterr().out


def test_vocabulary_of_bytes_is_told(capsys):
  cost.main([f'--config={CONFIGS / "moe.py:tiny"}'])
  assert 'vocabulary of the bytes, 257' in capsys.readouterr().out


BAD = {
  'no file': (['--config=no/such.py'], 'no/such.py is no file'),
  'no recipe': (['--config='], '--config=FILE is missing'),
  'typo in a name': (['--config=dense_tny'], '(did you mean dense:tiny?)'),
  'batch': (['--batch_sizes=0'], "got '0'"),
  'context': (['--context=-1'], '--context must not be negative'),
  'word': (['now'], "'now' is not a flag"),
  'flag': (['--contxt=2'], '(did you mean --context?)'),
  'field': (
    ['--config.model.heads=2'],
    'no field --config.model.heads (did you mean --config.model.num_heads?)',
  ),
  'value': (['--config.model.mlp=x'], "one of swiglu, gelu, gelu_erf; got 'x'"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_sentence(name):
  flags, said = BAD[name]
  with pytest.raises(UserError) as raised:
    cost.main([f'--config={CONFIGS / "dense.py:tiny"}', *flags])
  assert said in str(raised.value)


def test_a_recipe_may_be_named(capsys):
  cost.main(['--config=dense:tiny'])
  by_name = capsys.readouterr().out
  cost.main([f'--config={CONFIGS / "dense.py:tiny"}'])
  assert capsys.readouterr().out == by_name


def test_says_what_a_part_that_the_recipe_has_not_is_made_of(capsys):
  cost.main(['--config=dense:tiny', '--config.model.memory.num_keys=64'])
  out, err = capsys.readouterr()
  assert f'{64**2 * 64:,}' in out
  assert err.startswith('The recipe has no model.memory, so ')
