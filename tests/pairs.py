# SPDX-License-Identifier: Apache-2.0
"""Small collections of pictures with captions, drawn by the tests."""

import io
import json
import pathlib
import tarfile

from PIL import Image

COLOURS = ('red', 'green', 'blue', 'yellow', 'purple', 'orange', 'black')


def png(number: int, size: tuple[int, int] = (6, 4)) -> bytes:
  """A picture that no other number has."""
  picture = Image.new('RGB', size, COLOURS[number % len(COLOURS)])
  picture.putpixel((0, 0), (number % 256, number // 256, 7))
  file = io.BytesIO()
  picture.save(file, 'PNG')
  return file.getvalue()


def records(number: int) -> list[dict]:
  return [
    dict(
      image=f'{i:03}.png',
      captions=[f'picture {i}', f'{COLOURS[i % len(COLOURS)]} {i}'],
      group=f'group {i % 5}',
    )
    for i in range(number)
  ]


def write_folder(
  folder: pathlib.Path, lines: list, number: int | None = None
) -> pathlib.Path:
  """A folder of pairs: the lines, and as many pictures, named by numbers."""
  (folder / 'images').mkdir(parents=True, exist_ok=True)
  for i in range(len(lines) if number is None else number):
    (folder / 'images' / f'{i:03}.png').write_bytes(png(i))
  text = '\n'.join(
    line if isinstance(line, str) else json.dumps(line) for line in lines
  )
  (folder / 'captions.jsonl').write_text(text)
  return folder


def write_tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with tarfile.open(path, 'w') as tar:
    for name, content in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(content)
      tar.addfile(entry, io.BytesIO(content))
  return path
