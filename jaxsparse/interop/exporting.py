# SPDX-License-Identifier: Apache-2.0
"""From a workdir to a folder that others load.

A class of transformers is chosen if its config.json, read back, is the model;
what none of them has goes out under our own names, with our own config.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxsparse.config import Config, ModelConfig, saved_config
from jaxsparse.config.errors import UserError, require
from jaxsparse.interop import hugging_face, our_leaves, own_format
from jaxsparse.interop import layout as layout_lib
from jaxsparse.interop.layout import Layout
from jaxsparse.interop.source import INDEX, WHOLE
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.progress import Reporter

# Of one file, as transformers writes them.
FILE_BYTES = 5 * 10**9

# What transformers reads beside our own files, too.
_METADATA = dict(format='pt')


class Form(NamedTuple):
  """How a model goes out.

  Attributes:
    name: class of transformers; empty for our own form.
    config: what config.json is to hold, as text.
    layout: where our leaves are to lie.
  """

  name: str
  config: str
  layout: Layout


def form_of(config: Config, special_ids: dict[str, Any], dtype: str) -> Form:
  """The first class of transformers that is this model, or our own form.

  Args:
    config: of the run, with vocab_size set.
    special_ids: 'bos_token_id' and the like, for programs that generate.
    dtype: of the tensors.
  """
  model = config.model
  for family in hugging_face.FAMILIES:
    for kind, name in family.MODEL_TYPES.items():
      content = family.to_json(model, kind)
      if content is None:
        continue
      content = dict(
        architectures=[name],
        model_type=kind,
        **content,
        max_position_embeddings=config.data.seq_len,
        dtype=dtype,
        torch_dtype=dtype,
        **special_ids,
      )
      if _is(model, family.to_config, content):
        layout = family.layout(model, kind)
        return Form(name, json.dumps(content, indent=2) + '\n', layout)
  return Form('', saved_config.to_json(config), own_format.layout(model))


def _is(
  model: ModelConfig,
  to_config: Callable[[dict[str, Any]], ModelConfig],
  content: dict[str, Any],
) -> bool:
  """Whether a config.json says this model, and nothing else."""
  try:
    # As it is read from a file.
    read = to_config(json.loads(json.dumps(content)))
  except UserError:
    return False
  return _function_of(read) == _function_of(model)


def _function_of(model: ModelConfig) -> ModelConfig:
  """The config without what is of training, decoding or how it is computed."""
  default = ModelConfig()
  plain = dict(
    query_chunk=default.query_chunk,
    attention_implementation=default.attention_implementation,
    init_deviations=default.init_deviations,
    dropout_rate=default.dropout_rate,
    kv_cache=default.kv_cache,
    dtype=default.dtype,
    use_remat=default.use_remat,
    attention_pattern=model.attention_blocks,
  )
  if model.qk_norm_epsilon == model.norm_epsilon:
    plain['qk_norm_epsilon'] = default.qk_norm_epsilon
  if moe := model.moe:
    plain['mlp_dim'] = moe.expert_dim
    plain['moe'] = dataclasses.replace(
      moe, balance_loss_weight=0.0, router_z_loss_weight=0.0
    )
  return dataclasses.replace(model, **plain)


def write(
  params: dict[str, Any],
  form: Form,
  folder: pathlib.Path,
  dtype: str = 'float32',
  reporter: Reporter | None = None,
  file_bytes: int = FILE_BYTES,
) -> None:
  """Writes the tensors, file after file, and then config.json.

  Args:
    params: the parameters, on any mesh.
    form: see `form_of`.
    folder: missing or empty.
    dtype: of the tensors that are of float32 here.
    reporter: shows how far it is.
    file_bytes: most that a file of several tensors holds.

  Raises:
    UserError: it can't be written, or a number does not fit `dtype`.
  """
  reporter = reporter or Reporter(is_silent=True)
  leaves = our_leaves.flat(params)
  tensors = _Tensors(form.layout, leaves, dtype)
  files = _files(tensors, file_bytes)
  total, done = sum(leaf.size for leaf in leaves.values()), 0
  bar = reporter.steps(0, total, 'parameters exported', False, 'parameters')
  with _write_errors(folder), bar:
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
      content = {name: tensors.make(name) for name in names}
      # The library's own files are for their owner alone.
      (folder / file).touch()
      mode = (folder / file).stat().st_mode
      save_file(content, folder / file, _METADATA)
      (folder / file).chmod(mode)
      done += sum(tensor.size for tensor in content.values())
      reporter.show(done, total, {}, is_logged=len(files) > 1)
    if len(files) > 1:
      index = dict(
        metadata=dict(total_size=sum(map(tensors.num_bytes, tensors.shapes))),
        weight_map={n: file for file, names in files.items() for n in names},
      )
      text = json.dumps(index, indent=2) + '\n'
      workdir_lib.write_whole(folder / INDEX, text.encode())
    # Last: without it, what was not finished is no model.
    workdir_lib.write_whole(folder / 'config.json', form.config.encode())


class _Tensors:
  """Tensors of others, each made of our leaves when it is written."""

  def __init__(self, layout: Layout, leaves: dict[str, Any], dtype: str):
    self.shapes = layout_lib.tensors(layout)
    self._layout, self._leaves, self._dtype = layout, leaves, dtype
    self._parts = collections.defaultdict(list)
    for path, leaf in layout.items():
      for place, part in enumerate(leaf.sources):
        self._parts[part.name].append((path, place, part))
    # What is on other devices comes here as a whole; neighbours share it.
    self._read = functools.lru_cache(3)(lambda path: np.asarray(leaves[path]))

  def dtype_of(self, name: str) -> np.dtype:
    own = self._leaves[self._parts[name][0][0]].dtype
    return np.dtype(self._dtype) if own == np.float32 else own

  def num_bytes(self, name: str) -> int:
    return math.prod(self.shapes[name]) * self.dtype_of(name).itemsize

  def make(self, name: str) -> np.ndarray:
    whole = np.empty(self.shapes[name], self.dtype_of(name))
    for path, place, part in self._parts[name]:
      leaf = self._layout[path].to_theirs(self._read(path))[place]
      with np.errstate(over='ignore'):
        part.of(whole)[...] = leaf
    require(
      layout_lib.is_finite(whole),
      f'{name} holds numbers that are not finite in {whole.dtype}: give '
      'another --dtype.',
    )
    return whole


def _files(tensors: _Tensors, file_bytes: int) -> dict[str, list[str]]:
  """Names of tensors by file, in order, each file filled up."""
  groups, size = [[]], 0
  for name in tensors.shapes:
    num_bytes = tensors.num_bytes(name)
    if groups[-1] and size + num_bytes > file_bytes:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += num_bytes
  if len(groups) == 1:
    return {WHOLE: groups[0]}
  stem, count = WHOLE.removesuffix('.safetensors'), len(groups)
  return {
    f'{stem}-{i:05}-of-{count:05}.safetensors': names
    for i, names in enumerate(groups, 1)
  }


@contextlib.contextmanager
def _write_errors(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f"{str(folder)!r} can't be written ({error}): name another folder or "
      'make room.'
    ) from error
