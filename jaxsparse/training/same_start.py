# SPDX-License-Identifier: Apache-2.0
"""The processes of one run have the same code, config, text and workdir.

With others each would train something else, or wait for another for ever.
"""

import hashlib
import pathlib

import jax
from etils import epath

from jaxsparse.config import Config, saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.run import hosts
from jaxsparse.run import workdir as workdir_lib

# What a host may have for itself.
_OWN = ('data.cache_dir', 'data.prefetch')


def require_same_program(config: Config, workdir: epath.PathLike) -> None:
  """Checks what is known before anything is read or written.

  Raises:
    UserError: the code, the config or the workdir's name is not process 0's.
  """
  if jax.process_count() == 1:
    return
  _require_same({'jaxsparse': _code(), 'JAX': jax.__version__})
  _require_same({'--workdir': str(workdir)})
  configs = [
    saved_config.from_json(text)
    for text in hosts.gather(saved_config.to_json(config))
  ]
  for index, other in enumerate(configs):
    changes = [
      f'{name}: {first!r} -> {own!r}'
      for name, (first, own) in saved_config.differences(
        configs[0], other
      ).items()
      if name not in _OWN
    ]
    if changes:
      _refuse(index, f'config ({"; ".join(changes)})')


def require_same_data(
  corpus: Corpus, tokens: Tokenizer, workdir: epath.PathLike
) -> None:
  """Checks what process 0 has made and the others have found.

  Raises:
    UserError: the text, the tokenizer or the workdir is not process 0's.
  """
  if jax.process_count() == 1:
    return
  sample = corpus.validation[0].text.decode('utf-8', 'replace')
  saved = epath.Path(workdir) / workdir_lib.CONFIG
  _require_same(
    {
      'text': corpus.key,
      'text learned before': corpus.before.key if corpus.before else '',
      'tokenizer': _digest(tokens.encode(sample).tobytes()),
      f'{workdir_lib.CONFIG} in --workdir, which all must reach,': _digest(
        saved.read_bytes() if saved.exists() else b''
      ),
    }
  )


def _require_same(facts: dict[str, str]) -> None:
  everywhere = hosts.gather(facts)
  for index, other in enumerate(everywhere):
    for name, value in everywhere[0].items():
      if other[name] != value:
        _refuse(index, f'{name} ({value} -> {other[name]})')


def _refuse(index: int, what: str) -> None:
  raise UserError(
    f'process {index} of {jax.process_count()} has another {what} than '
    'process 0: start all with the same code, command and files.'
  )


def _code() -> str:
  """Of all that this process may import of jaxsparse."""
  folder = pathlib.Path(__file__).parents[1]
  files = sorted(folder.rglob('*.py'))
  return _digest(b'\0'.join(path.read_bytes() for path in files))


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:12]
