# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of published models into a workdir, and out of one."""

import json
import pathlib

import tokenizers
from etils import epath

from jaxsparse.config.errors import require
from jaxsparse.data import tokenizer as tokenizer_lib
from jaxsparse.data import tokenizer_roles
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.data.tokenizer_roles import Roles
from jaxsparse.run import workdir as workdir_lib

_NONE = '{!r} has no tokenizer: the model reads ids of tokens only.'


def copy_tokenizer(
  source: epath.PathLike, workdir: epath.PathLike, vocab_size: int
) -> str:
  """Brings a folder's tokenizer, its roles and its chat template.

  Args:
    source: a folder as Hugging Face has them.
    workdir: a new one; written only when all is well.
    vocab_size: rows of the model's table, of which the last may have no token.

  Returns:
    What it did, in a sentence.

  Raises:
    UserError: it can't be read, has more tokens than the model, or none that
      ends a document.
  """
  source, workdir = epath.Path(source), epath.Path(workdir)
  paths = (source / name for name in workdir_lib.TOKENIZERS)
  path = next((path for path in paths if path.exists()), None)
  if path is None:
    return _NONE.format(str(source))
  roles = Roles.read(source) or Roles()
  tokenizer = tokenizer_lib.read(path, roles)
  _check(tokenizer, path, roles, vocab_size)
  workdir.mkdir(parents=True, exist_ok=True)
  for name in (path.name, *tokenizer_roles.FILES):
    if (source / name).exists():
      workdir_lib.write_whole(workdir / name, (source / name).read_bytes())
  if not (source / tokenizer_roles.CONFIG).exists():
    # Without one, tokens of a workdir have the roles of our own vocabularies.
    workdir_lib.write_whole(workdir / tokenizer_roles.CONFIG, b'{}\n')
  return (
    f'The tokenizer is {path.name}, of {tokenizer.vocab_size:,} tokens: '
    f'{_told(tokenizer)}.'
  )


def _told(tokenizer: Tokenizer) -> str:
  """Which tokens have which roles."""
  texts = {i: repr(text) for text, i in tokenizer.markers.items()}
  roles = {
    'a document begins with': tokenizer.begin_id,
    'and ends with': tokenizer.boundary_id,
    'an answer ends with': tokenizer.stop_ids[0],
  }
  return ', '.join(f'{role} {texts.get(i, i)}' for role, i in roles.items())


def _check(
  tokenizer: Tokenizer, path: epath.Path, roles: Roles, vocab_size: int
) -> None:
  if path.suffix == '.json':
    known = tokenizers.Tokenizer.from_str(path.read_text()).get_vocab()
    named = dict(eos_token=roles.eos, bos_token=roles.bos)
    for field, token in named.items():
      require(
        token is None or token in known,
        f'{field} = {token!r} of {tokenizer_roles.CONFIG} is no token of '
        f'{str(path)!r}: give the files of one model.',
      )
    require(
      tokenizer.boundary_id in known.values(),
      f'{str(path)!r} has no token that ends a document: name it as eos_token '
      f'in the {tokenizer_roles.CONFIG} beside it.',
    )
  require(
    tokenizer.vocab_size <= vocab_size,
    f'{str(path)!r} has {tokenizer.vocab_size:,} tokens, but the model knows '
    f'{vocab_size:,}: give the tokenizer with which it was trained.',
  )


def write_tokenizer(
  workdir: epath.PathLike, folder: str | pathlib.PurePath
) -> str:
  """Writes a workdir's tokenizer as Hugging Face's folders have it.

  Returns:
    What it did, in a sentence.

  Raises:
    UserError: it can't be read.
  """
  workdir, folder = epath.Path(workdir), epath.Path(folder)
  if not workdir_lib.has_tokenizer(workdir):
    return _NONE.format(str(workdir))
  tokenizer = tokenizer_lib.load_from_workdir(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  if isinstance(tokenizer, tokenizer_lib.ByteTokenizer):
    tokenizer = tokenizer_lib.bytes_as_json()
  tokenizer.save(folder)
  for name in tokenizer_roles.FILES:
    if (workdir / name).exists():
      workdir_lib.write_whole(folder / name, (workdir / name).read_bytes())
  said = f'The tokenizer has {tokenizer.vocab_size:,} tokens.'
  if (workdir / tokenizer_roles.CONFIG).exists():
    return said
  texts = {i: text for text, i in tokenizer.markers.items()}
  config = dict(
    tokenizer_class='PreTrainedTokenizerFast',
    bos_token=texts.get(tokenizer.begin_id),
    eos_token=texts.get(tokenizer.boundary_id),
    # Whoever wants it before a text puts it there, as for all of ours.
    add_bos_token=False,
    clean_up_tokenization_spaces=False,
  )
  if not isinstance(tokenizer, tokenizer_lib.JsonTokenizer):
    config['tokenizer_class'] = 'LlamaTokenizer'
  content = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
  workdir_lib.write_whole(folder / tokenizer_roles.CONFIG, content.encode())
  return said
