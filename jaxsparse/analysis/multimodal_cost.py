# SPDX-License-Identifier: Apache-2.0
"""Parameters and products of pictures beside text, in closed form.

As `cost` counts them. Letters: Li patches of P^2 pixels, D and E widths of the
stream that reads and of the one that is read, N query heads, K key/value heads,
H head width.
"""

import dataclasses

from jaxsparse.analysis import attention_cost, cost
from jaxsparse.analysis.cost import Parameters
from jaxsparse.config import ModelConfig, MultiModalConfig, VisionConfig
from jaxsparse.config.multimodal import fusion_stream


def vision_parameters(config: VisionConfig) -> Parameters:
  """Of a `PatchEncoder`; tables of places count as an embedding."""
  width = config.stream.model_dim
  tables = dict(learned=config.num_patches, factorised=2 * config.grid)
  return _sum(
    cost.count_parameters(config.stream),
    Parameters(
      embedding=tables.get(config.positions, 0) * width,
      dense=config.patch_dim * width,
      gains=width,
    ),
  )


def vision_flops(config: VisionConfig) -> int:
  """Forward FLOPs of a picture: 2 Li a parameter, and 4 L Li^2 D of scores."""
  length, width = config.num_patches, config.stream.model_dim
  per_patch = cost.forward_flops(config.stream, length)
  return length * (per_patch + 2 * config.patch_dim * width)


def multimodal_parameters(
  config: MultiModalConfig, model: ModelConfig
) -> Parameters:
  """Of a `MultiModalEncoder`, its text `model` among them."""
  vision = config.vision
  text_width, image_width = model.model_dim, vision.stream.model_dim
  maps, parts = [text_width, image_width], []
  if vision.pooling == 'attention':
    parts.append(_pool(vision.stream))
  if config.num_frames > 1 and config.frame_choice == 'routed':
    heads = model.num_heads * text_width + image_width
    parts.append(Parameters(embedding=0, dense=heads * model.head_dim, gains=0))
  if config.fusion_type == 'co_attention':
    parts += parts[:1] if vision.pooling == 'attention' else []
    maps += [text_width, image_width]
    parts += config.num_fusion_layers * [co_attention_layer(config, model)]
    parts.append(Parameters(embedding=0, dense=0, gains=_norm(model)))
    parts.append(Parameters(embedding=0, dense=0, gains=_norm(vision.stream)))
  elif config.fusion_type == 'concat':
    maps.append(text_width)
    stream = fusion_stream(model, config.num_fusion_layers)
    stream = dataclasses.replace(stream, vocab_size=0)
    joined = image_width * text_width
    parts.append(cost.count_parameters(stream))
    parts.append(Parameters(embedding=2 * text_width, dense=joined, gains=0))
  elif config.fusion_type == 'prefix':
    maps.append(text_width)
    joined = image_width * text_width
    parts.append(Parameters(embedding=0, dense=joined, gains=0))
  dense = config.fused_dim * (sum(maps) + (config.matching_weight > 0))
  scalars = 2 if config.contrastive == 'siglip' else 1
  return _sum(
    cost.count_parameters(model),
    vision_parameters(vision),
    Parameters(embedding=0, dense=dense, gains=scalars),
    *parts,
  )


def pair_flops(
  config: MultiModalConfig, model: ModelConfig, num_tokens: int
) -> int:
  """Forward FLOPs of a text and a picture, or frames: towers, fusion, logits.

  As `cost.forward_flops` counts; a stream over both has the text's width.

  Args:
    config: of the picture.
    model: of the text.
    num_tokens: of the text.
  """
  streams = dataclasses.replace(model, vocab_size=0)
  flops = num_tokens * cost.forward_flops(streams, num_tokens)
  flops += config.num_frames * vision_flops(config.vision)
  joined = num_tokens + config.most_frames_read * config.vision.num_patches
  if config.fusion_type == 'co_attention':
    flops += co_attention_flops(config, model, num_tokens)
  elif config.fusion_type == 'concat':
    layers = fusion_stream(streams, config.num_fusion_layers)
    flops += joined * cost.forward_flops(layers, joined)
  elif config.fusion_type == 'prefix':
    flops += joined * cost.forward_flops(streams, joined)
  if config.caption_weight:
    flops += 2 * num_tokens * model.model_dim * model.vocab_size
  return flops


def co_attention_layer(
  config: MultiModalConfig, model: ModelConfig
) -> Parameters:
  """Of one `CoAttention`; a causal text reads and is not read."""
  text, image = (
    fusion_stream(stream, 1) for stream in (model, config.vision.stream)
  )
  parts = [_reader(text, image.model_dim)]
  if model.is_causal:
    parts.append(Parameters(embedding=0, dense=0, gains=_norm(image)))
  else:
    parts.append(_reader(image, text.model_dim))
  return _sum(*parts)


def co_attention_flops(
  config: MultiModalConfig, model: ModelConfig, num_tokens: int
) -> int:
  """Forward FLOPs of fusing one pair: products of a matrix and of scores.

  Per direction 2 Lq D N H of queries and as many of what is written, 4 Lk E K H
  of keys and values and 4 Lq Lk N H of scores and sums; then MLPs and blocks.

  Args:
    config: of the picture; its frames_read count.
    model: of the text.
    num_tokens: of the text.
  """
  streams = [fusion_stream(s, 1) for s in (model, config.vision.stream)]
  num_patches = config.most_frames_read * config.vision.num_patches
  lengths = num_tokens, num_patches
  directions = ((0, 1),) if model.is_causal else ((0, 1), (1, 0))
  flops = 0
  for i, j in directions:
    stream, width = streams[i], streams[j].model_dim
    heads, keys = stream.num_heads, stream.num_kv_heads
    written = 2 * stream.model_dim * heads
    flops += 2 * lengths[i] * written * stream.head_dim
    flops += 4 * lengths[j] * width * keys * stream.head_dim
    flops += 4 * lengths[i] * lengths[j] * heads * stream.head_dim
    block = dataclasses.replace(stream, vocab_size=0)
    flops += lengths[i] * cost.forward_flops(block, lengths[i])
    flops += lengths[i] * 2 * cost.mlp_parameters(stream)
  return config.num_fusion_layers * flops


def _reader(stream: ModelConfig, other_width: int) -> Parameters:
  """What reads another stream, the MLP behind it, and a block."""
  block = cost.count_parameters(dataclasses.replace(stream, vocab_size=0))
  cross = _cross_attention(stream, other_width)
  # The count of a block has a final norm, for which one of two stands in.
  mlp_norm = Parameters(embedding=0, dense=0, gains=_norm(stream))
  return _sum(block, cross, _mlp(stream), mlp_norm)


def _cross_attention(stream: ModelConfig, other_width: int) -> Parameters:
  heads = stream.num_heads * 2 * stream.model_dim
  heads += stream.num_kv_heads * 2 * other_width
  gains = attention_cost.attention_gains(stream, 0)
  return Parameters(embedding=0, dense=heads * stream.head_dim, gains=gains)


def _mlp(stream: ModelConfig) -> Parameters:
  gains = 0
  if stream.bias == 'all':
    inner = stream.mlp_dim * (2 if stream.mlp == 'swiglu' else 1)
    gains = inner + stream.model_dim
  return Parameters(embedding=0, dense=cost.mlp_parameters(stream), gains=gains)


def _pool(stream: ModelConfig) -> Parameters:
  """A learned query, what reads the stream by it, and an MLP with its norm."""
  width = stream.model_dim
  return _sum(
    _cross_attention(stream, width),
    _mlp(stream),
    Parameters(embedding=width, dense=0, gains=_norm(stream)),
  )


def _norm(stream: ModelConfig) -> int:
  return stream.model_dim * (2 if stream.norm == 'layer' else 1)


def _sum(*parts: Parameters) -> Parameters:
  totals = {
    field.name: sum(getattr(part, field.name) for part in parts)
    for field in dataclasses.fields(Parameters)
  }
  return Parameters(**totals)
