# SPDX-License-Identifier: Apache-2.0
"""Text from any TensorFlow Dataset, by its name or its directory.

Only random access is used, so that TensorFlow is not needed, unless the
dataset's own code that prepares it asks for it.
"""

import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import pieces
from jaxsparse.run.workdir import expanded

_TIMEOUT_SECONDS = 5


def read(
  config: DataConfig, say: Any = print
) -> tuple[pieces.Pieces, pieces.Pieces, str]:
  """The training and validation documents, and what they are called.

  Raises:
    UserError: the dataset is unknown, neither prepared nor reachable, or has
      no such feature or split.
  """
  builder = find(config.tfds)
  _require_text(builder, config)
  train, validation = (
    pieces.Pieces(source, config.tfds_feature)
    for source in sources(builder, config.tfds, config, say)
  )
  return train, validation, builder.info.full_name


def sources(
  builder: tfds.core.DatasetBuilder,
  name: str,
  config: DataConfig,
  say: Any,
  decoders: Any = None,
) -> list[Any]:
  """Random access to the examples of both splits; prepares them if need be.

  Args:
    builder: of `find`.
    name: of the dataset, as errors have it.
    config: names the splits.
    say: gets a line where that takes long.
    decoders: of features that are not to be decoded.

  Raises:
    UserError: they can't be prepared or read, or a split has no examples.
  """
  if not builder.is_prepared():
    _prepare(builder, name, say)
  found = []
  for field in ('tfds_train_split', 'tfds_validation_split'):
    split = getattr(config, field)
    try:
      source = builder.as_data_source(split=split, decoders=decoders)
      if not len(source):
        raise ValueError('no examples')
    except NotImplementedError as error:
      raise UserError(
        f'data.tfds = {name!r} is prepared in a format without random '
        "access: prepare it again with file_format='array_record'."
      ) from error
    except (ValueError, KeyError) as error:
      raise UserError(
        f'data.{field} = {split!r} names no documents of {name!r}: its '
        f'splits are {", ".join(builder.info.splits)}.'
      ) from error
    found.append(source)
  return found


def find(name: str) -> tfds.core.DatasetBuilder:
  """The dataset of a name or directory, prepared or not.

  Raises:
    UserError: it is unknown, or can't be opened.
  """
  name = expanded(name)
  try:
    if (epath.Path(name) / 'dataset_info.json').exists():
      return tfds.builder_from_directory(name)
    return tfds.builder(name, file_format='array_record')
  except tfds.core.DatasetNotFoundError as error:
    raise UserError(
      f'data.tfds = {name!r} is unknown: give a name that '
      'tensorflow_datasets.list_builders() shows, or the directory of a '
      'prepared dataset.'
    ) from error
  except Exception as error:
    raise UserError(
      f'data.tfds = {name!r} cannot be opened ({_first_line(error)}): give '
      "'name', 'name/config' or the directory of a prepared dataset."
    ) from error


def _require_text(builder: Any, config: DataConfig) -> None:
  features = builder.info.features
  texts = [
    name
    for name in features or ()
    if isinstance(features[name], tfds.features.Text)
  ]
  if config.tfds_feature not in texts:
    raise UserError(
      f'data.tfds_feature = {config.tfds_feature!r} is no text of '
      f'{config.tfds!r}: its texts are {", ".join(texts) or "none"}.'
    )


def _prepare(builder: Any, name: str, say: Any) -> None:
  # TFDS itself would try again for minutes.
  if host := unreachable_host(list(builder.url_infos or ())):
    raise UserError(
      f'data.tfds = {name!r} is not prepared in {builder.data_dir!r}, and '
      f'{host} cannot be reached to download it: prepare it where there is a '
      "network, with file_format='array_record', and copy it there."
    )
  say(f'Preparing {name} in {builder.data_dir} ...')
  try:
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  except Exception as error:
    raise UserError(
      f'data.tfds = {name!r} cannot be prepared ({_first_line(error)}): '
      'prepare it by hand with tensorflow_datasets, as array_record.'
    ) from error


def unreachable_host(urls: list[str]) -> str | None:
  """The first host among the URLs' that gives no answer."""
  roots = {}
  for url in urls:
    parts = urllib.parse.urlsplit(url)
    roots[parts.netloc] = f'{parts.scheme}://{parts.netloc}/'
  for host, root in roots.items():
    try:
      request = urllib.request.Request(root, method='HEAD')
      urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
      continue
    except (OSError, ValueError):
      return host
  return None


def _first_line(error: Exception) -> str:
  lines = str(error).splitlines() or ['']
  # It may repeat a name that is not UTF-8.
  line = lines[0].encode(errors='backslashreplace').decode()
  return f'{type(error).__name__}: {line}'
