# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from top to bottom, and is committed without outputs."""

import os
import pathlib

import nbclient
import nbformat
import pytest

COLAB = pathlib.Path(__file__).parents[1] / 'colab'
NOTEBOOK = COLAB / 'train_ultramem.ipynb'


def texts(cell):
  return ''.join(
    output.get('text', '') or output.get('data', {}).get('text/plain', '')
    for output in cell.outputs
  )


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch):
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  assert len(notebook.cells) <= 25
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert not any(cell.outputs for cell in cells)

  for cell in cells:
    # Fewer steps, and a workdir outside the repository.
    cell.source = cell.source.replace('STEPS = 150', 'STEPS = 55')
    cell.source = cell.source.replace("'runs/", f"'{tmp_path}/")
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  # More is run than compiled here, unlike in the rest of the suite.
  monkeypatch.delenv('XLA_FLAGS')
  monkeypatch.setenv('PYTHONPATH', os.fspath(COLAB.parent))
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': os.fspath(COLAB)}}
  )
  client.execute()

  by_source = {cell.source.split('\n')[0]: cell for cell in cells}

  def cell_with(text):
    return next(c for source, c in by_source.items() if text in source)

  assert "'value_table': (4096, 32)" in texts(cell_with('layer = MemoryLayer('))
  assert '(2, 64, 128)' in texts(cell_with('y, metrics'))
  assert 'step 55/55' in texts(cell_with('%run ../train.py'))
  assert 'validation_bits_per_byte' in texts(cell_with('lines ='))
  assert 'def ' in texts(cell_with('--max_tokens=120'))
  assert 'in 500 rows of tables' in texts(cell_with('FACT ='))
  assert texts(cell_with('ASK =')).count('def capital_of_zora(): return ') == 2
  pictures = [
    output.data['image/png']
    for cell in cells
    for output in cell.outputs
    if 'image/png' in output.get('data', {})
  ]
  assert len(pictures) == 2
