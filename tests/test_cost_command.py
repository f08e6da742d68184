"""`python -m jaxsparse.cost`."""

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


def test_vocabulary_of_bytes_is_told(capsys):
  assert cost.main([f'--config={CONFIGS / "moe_tiny.py"}']) == 0
  assert 'vocabulary of the bytes, 257' in capsys.readouterr().out


def test_bad_input_is_one_sentence(capsys):
  path = CONFIGS / 'dense_tiny.py'
  assert cost.main(['--config=no/such.py']) == 1
  assert cost.main([f'--config={path}', '--batch_sizes=0']) == 1
  first, second = capsys.readouterr().err.strip().splitlines()
  assert 'no/such.py is no file' in first
  assert "got '0'" in second
