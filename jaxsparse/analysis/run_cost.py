# SPDX-License-Identifier: Apache-2.0
"""What the model of a run costs, of text alone or of pictures beside it."""

from jaxsparse.analysis import cost, multimodal_cost
from jaxsparse.config import Config


def parameters(config: Config) -> cost.Parameters:
  """Of the whole model, with `vocab_size` as it is."""
  if config.multimodal is None:
    return cost.count_parameters(config.model)
  return multimodal_cost.multimodal_parameters(config.multimodal, config.model)


def forward_flops(config: Config) -> int:
  """Of a token of text, or of a pair of a text and a picture."""
  length = config.data.seq_len
  if config.multimodal is None:
    return cost.forward_flops(config.model, length)
  return multimodal_cost.pair_flops(config.multimodal, config.model, length)


def training_flops(config: Config) -> float:
  """Of a token of a batch, forward and backward."""
  per_pair = config.data.seq_len if config.multimodal else 1
  return 3 * forward_flops(config) / per_pair
