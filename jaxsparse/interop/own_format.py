# SPDX-License-Identifier: Apache-2.0
"""Models that no class of others has: our names, our config, safetensors."""

import json
import pathlib
from typing import Any

from jaxsparse.config import ModelConfig, saved_config
from jaxsparse.config.errors import require
from jaxsparse.interop import our_leaves, tokenizers_in
from jaxsparse.interop.importing import Opened
from jaxsparse.interop.layout import Layout, Part, as_is
from jaxsparse.interop.source import SafetensorsSource


def is_own(content: dict[str, Any]) -> bool:
  """Whether a config.json is one of ours."""
  return 'model_type' not in content and isinstance(content.get('model'), dict)


def open_folder(folder: pathlib.Path, content: dict[str, Any]) -> Opened:
  """What an export under our own names holds.

  Raises:
    UserError: it is damaged.
  """
  config = saved_config.from_json(json.dumps(content))
  model = config.model
  require(
    model.vocab_size > 0,
    'model.vocab_size in config.json must be set, got 0.',
  )
  return Opened(
    source=SafetensorsSource(folder),
    layout=layout(model),
    config=model,
    length=config.data.seq_len,
    family='jaxsparse',
    origin=dict(format='jaxsparse', folder=folder.name),
    write_tokenizer=lambda workdir: tokenizers_in.copy_tokenizer(
      folder, workdir, model.vocab_size
    ),
  )


def layout(model: ModelConfig) -> Layout:
  """Each leaf under its own path."""
  leaves = our_leaves.abstract(model, our_leaves.mesh_for(model))
  return {n: as_is(Part(n, leaf.shape)) for n, leaf in leaves.items()}
