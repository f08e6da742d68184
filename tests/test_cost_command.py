"""`python -m jaxsparse.cost`."""

import pytest
from recipes import CONFIGS

from jaxsparse import cost


def test_prints_parameters_flops_and_bytes(capsys):
  path = CONFIGS / 'ultramem_1b6.py'
  assert cost.main([f'--config={path}', '--batch_sizes=1,64']) == 0
  out = capsys.readouterr().out
  assert 'as papers count: 21,391,' in out
  assert '3.499 GFLOPs' in out
  # 64 sequences of 84 rows of 1,024 values in 6 layers, 2 bytes each.
  assert f'{64 * 84 * 1024 * 6 * 2 / 1e9:.4g}' in out


def test_fields_are_overridden_as_in_training(capsys):
  """Two heads of keys and values for sixteen of queries: an eighth of both."""
  flags = [f'--config={CONFIGS / "ultramem_1b6.py"}', '--batch_sizes=64']
  caches = []
  for overrides in [], ['--config.model.num_kv_heads=2']:
    assert cost.main(flags + overrides) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    caches.append(float(last[4]))
  assert caches[0] == pytest.approx(8 * caches[1], rel=1e-3)


def test_vocabulary_of_bytes_is_told(capsys):
  assert cost.main([f'--config={CONFIGS / "moe_tiny.py"}']) == 0
  assert 'vocabulary of the bytes, 257' in capsys.readouterr().out


def test_bad_input_is_one_sentence(capsys):
  path = CONFIGS / 'dense_tiny.py'
  assert cost.main(['--config=no/such.py']) == 1
  assert cost.main([f'--config={path}', '--batch_sizes=0']) == 1
  wrong = ['now', '--kv=2', '--config.model.heads=2', '--config.model.mlp=x']
  for flag in wrong:
    assert cost.main([f'--config={path}', flag]) == 1
  lines = capsys.readouterr().err.strip().splitlines()
  parts = ['no/such.py is no file', "got '0'", "'now' is not a flag"]
  parts += ["'kv'", 'Field heads', "one of swiglu, gelu, gelu_erf; got 'x'"]
  for line, part in zip(lines, parts, strict=True):
    assert part in line
