# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxsparse tables`."""

import numpy as np
import pytest

from jaxsparse.cli import tables
from jaxsparse.config.errors import UserError
from jaxsparse.run import row_store, table_files


def test_tables_are_told_and_compared(tmp_path, capsys):
  with pytest.raises(UserError, match='has no tables on file'):
    tables.main([f'--workdir={tmp_path}'])
  leaf = row_store.Leaf(10**6, 16, 'float32')
  folder = table_files.folder_of(tmp_path)
  store = row_store.create(folder, {'value_table': leaf})
  store.fill('value_table', 5, np.ones((1, 16), np.float32))
  store.seal(0)
  store.close()
  tables.main([f'--workdir={tmp_path}', '--verify'])
  out = capsys.readouterr().out
  assert 'value_table: 1,000,000 x 16 float32, 61.0 MiB, 4.0 KiB on' in out
  assert 'All rows are those that were sealed.' in out
  with (folder / 'value_table.rows').open('r+b') as file:
    file.seek(5 * 64)
    file.write(b'x')
  with pytest.raises(UserError, match='is damaged: rows 0 to 65,535 differ'):
    tables.main([f'--workdir={tmp_path}', '--verify'])
