# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of others, in and out."""

import pathlib

from etils import epath

from jaxsparse.run import workdir as workdir_lib

_NAMES = (
  *workdir_lib.TOKENIZERS, 'tokenizer_config.json', 'chat_template.jinja',
)  # fmt: skip


def copy_tokenizer(
  folder: pathlib.Path, workdir: epath.PathLike, vocab_size: int
) -> str:
  """Brings a folder's tokenizer into a workdir; says in a sentence what."""
  del vocab_size
  return _copy(folder, workdir)


def write_tokenizer(workdir: epath.PathLike, folder: pathlib.Path) -> str:
  """Brings a workdir's tokenizer into a folder; says in a sentence what."""
  return _copy(workdir, folder)


def _copy(source, target) -> str:
  names = [n for n in _NAMES if (epath.Path(source) / n).exists()]
  for name in names:
    content = (epath.Path(source) / name).read_bytes()
    epath.Path(target).mkdir(parents=True, exist_ok=True)
    workdir_lib.write_whole(epath.Path(target) / name, content)
  if not names:
    return f'{str(source)!r} has no tokenizer: the model reads token ids only.'
  return f'Tokenizer: {", ".join(names)}.'
