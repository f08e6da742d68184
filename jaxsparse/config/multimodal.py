# SPDX-License-Identifier: Apache-2.0
"""The part of the configuration for pictures and frames beside text."""

import dataclasses
import functools
from typing import Any

from jaxsparse.config import fields
from jaxsparse.config.errors import (
  require,
  require_choice,
  require_fraction,
  require_not_negative,
  require_positive,
  require_unset,
)
from jaxsparse.config.model import ModelConfig

FUSION_TYPES = ('co_attention', 'concat', 'late', 'prefix')


def encoder_stream(width: int, num_layers: int) -> ModelConfig:
  """Blocks of an encoder, as ViT has them: heads of 64, an MLP of 4 widths."""
  num_heads = max(1, width // 64)
  return ModelConfig(
    num_layers=num_layers,
    model_dim=width,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=64 if width >= 64 else max(2, width // 2 * 2),
    mlp_dim=4 * width,
    mlp='gelu_erf',
    norm='layer',
    bias='all',
    is_causal=False,
  )


def fusion_stream(config: ModelConfig, num_layers: int) -> ModelConfig:
  """The stream in which another is met: dense blocks that see all."""
  nothing: dict[str, Any] = dict.fromkeys(config.beside_mlp)
  return dataclasses.replace(
    config,
    num_layers=num_layers,
    attention_pattern=('global',),
    window=256,
    sparse=None,
    memory=None,
    moe=None,
    **nothing,
  )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class VisionConfig:
  """A picture's patches, and the stream of blocks that encodes them (ViT)."""

  # Its blocks, with the mixers that a language model's may have. By default
  # those of ViT-B.
  stream: ModelConfig = dataclasses.field(
    default_factory=functools.partial(encoder_stream, 768, 12)
  )
  # Side S of a picture, and side P of a patch, in pixels.
  image_size: int = 224
  patch_size: int = 16
  # What says where a patch is: a table for each place ('learned', ViT), fixed
  # sines of row and column ('sincos'), a table for rows and one for columns
  # ('factorised', NaViT), or queries and keys rotated by both ('rope').
  positions: str = 'learned'
  # A picture's vector: 'mean' of its patches, or 'attention' of a learned query
  # to them (SigLIP's MAP head).
  pooling: str = 'mean'

  def __post_init__(self):
    fields.check(self)
    require_positive(self, 'image_size', 'patch_size')
    require_choice(
      self, 'positions', ('learned', 'sincos', 'factorised', 'rope')
    )
    require_choice(self, 'pooling', ('mean', 'attention'))
    require(
      self.image_size % self.patch_size == 0,
      f'patch_size must divide image_size = {self.image_size}, got '
      f'{self.patch_size}.',
    )
    stream = self.stream
    require(
      not stream.is_causal,
      'vision.stream.is_causal must be False, as patches have no order of '
      f'time; got {stream.is_causal}.',
    )
    require(
      set(stream.attention_pattern) == {'global'},
      "vision.stream.attention_pattern must be ('global',), as patches are in "
      f'a plane and not in a row; got {stream.attention_pattern}.',
    )
    require(
      stream.vocab_size == 0,
      'vision.stream.vocab_size must be 0, as patches are no tokens; got '
      f'{stream.vocab_size}.',
    )
    require(
      not stream.has_tables_on_file,
      'vision.stream.memory.table.store must be "device": only those of the '
      'text may lie elsewhere.',
    )
    width = dict(sincos=stream.model_dim, rope=stream.rope_dim)
    require(
      width.get(self.positions, 4) % 4 == 0,
      f'positions = {self.positions!r} needs a multiple of 4, for sines and '
      'cosines of rows and columns, as '
      + ('head_dim' if self.positions == 'rope' else 'model_dim')
      + f' of vision.stream; got {width.get(self.positions)}.',
    )

  @property
  def grid(self) -> int:
    """Patches along a side of a picture."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    return self.grid**2

  @property
  def patch_dim(self) -> int:
    """Numbers in a patch."""
    return 3 * self.patch_size**2


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MultiModalConfig:
  """Pictures or frames, how they meet the text of `model`, and what is learned.

  The loss is the sum of three by their weights. CoCa is fusion_type =
  'co_attention' with a causal text, contrastive = 'infonce' and caption_weight
  = 2; PaliGemma is fusion_type = 'prefix' with caption_weight = 1 alone.
  """

  vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
  # How both streams meet: 'co_attention', each reads the other (ViLBERT);
  # 'concat', one stream over both; 'late', not but in the product of their
  # vectors; 'prefix', the picture stands before the text in the language model.
  # A causal text reads the picture and is not read by it.
  fusion_type: str = 'co_attention'
  # Layers in which they meet, of the first two kinds.
  num_fusion_layers: int = 2
  # Width E of the vectors that are compared, and of what both are fused to.
  fused_dim: int = 512
  # Loss of all pairs of a batch: 'siglip' or 'infonce', and its weight.
  contrastive: str = 'siglip'
  contrastive_weight: float = 1.0
  # Weight of the next-token loss of the text with the picture visible.
  caption_weight: float = 0.0
  # Weight of telling a pair from its hard negatives by what both are fused to.
  matching_weight: float = 0.0
  # Frames F of an item; 1 is a picture.
  num_frames: int = 1
  # Of them, those that are fused with the text; 0 for all. A router learns by
  # comparing what is read: of one frame nothing, so a run begins with more.
  frames_read: int = 0
  # What chooses them: 'routed', the text by a router, of captions to be learned
  # the prompt before them alone; 'uniform', every n-th; 'change', those that
  # differ most from the one before.
  frame_choice: str = 'routed'
  # Of 'routed': share of the router's choice that is covered, with which fewer
  # than frames_read may be read; 1 reads as many.
  frame_coverage: float = 1.0

  def __post_init__(self):
    fields.check(self)
    require_choice(self, 'fusion_type', FUSION_TYPES)
    require_choice(self, 'contrastive', ('siglip', 'infonce'))
    require_choice(self, 'frame_choice', ('routed', 'uniform', 'change'))
    require_positive(self, 'num_fusion_layers', 'fused_dim', 'num_frames')
    require_not_negative(
      self, 'contrastive_weight', 'caption_weight', 'matching_weight'
    )
    require_not_negative(self, 'frames_read')
    require_fraction(self, 'frame_coverage')
    require(
      self.contrastive_weight + self.caption_weight + self.matching_weight > 0,
      'one of contrastive_weight, caption_weight and matching_weight must be '
      'above 0, or nothing is learned; got 0, 0 and 0.',
    )
    require(
      not self.caption_weight or self.fusion_type in ('prefix', 'co_attention'),
      'caption_weight is of a text that reads the picture, but fusion_type is '
      f"{self.fusion_type!r}: set it to 'prefix' or 'co_attention', or the "
      'weight to 0.',
    )
    require(
      not self.matching_weight or self.fusion_type != 'late',
      "matching_weight is of what both are fused to, but fusion_type is 'late' "
      'and fuses nothing: set another, or the weight to 0.',
    )
    require(
      self.frames_read <= self.num_frames,
      f'frames_read must be at most num_frames = {self.num_frames}, got '
      f'{self.frames_read}.',
    )
    is_routed = self.num_frames > 1 and self.frame_choice == 'routed'
    require(
      not is_routed or self.fusion_type in ('co_attention', 'late'),
      "frame_choice = 'routed' learns by what is read of each frame apart, as "
      "fusion_type = 'co_attention' and 'late' do; got "
      f"{self.fusion_type!r}: set frame_choice to 'uniform' or 'change'.",
    )
    unset = functools.partial(require_unset, self)
    unset(
      not self.has_fusion_layers,
      f'fusion_type = {self.fusion_type!r}',
      'num_fusion_layers',
    )
    unset(self.num_frames == 1, 'num_frames = 1', 'frame_choice')
    unset(
      self.num_frames == 1 or self.frame_choice != 'routed',
      f'num_frames = {self.num_frames} and frame_choice = '
      f'{self.frame_choice!r}',
      'frame_coverage',
    )

  @property
  def has_fusion_layers(self) -> bool:
    return self.fusion_type in ('co_attention', 'concat')

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Of one item: [S, S, 3], or with frames [F, S, S, 3]."""
    side = self.vision.image_size
    frames = () if self.num_frames == 1 else (self.num_frames,)
    return (*frames, side, side, 3)

  @property
  def most_frames_read(self) -> int:
    return self.frames_read or self.num_frames


def check_streams(model: ModelConfig, multimodal: MultiModalConfig) -> None:
  """Refuses a text stream that can't do what is asked of it."""
  needs_order = multimodal.fusion_type == 'prefix' or multimodal.caption_weight
  require(
    model.is_causal or not needs_order,
    'model.is_causal must be True for captions and for fusion_type = '
    f"'prefix', which a language model continues; got {model.is_causal}.",
  )
  require(
    not model.is_causal or multimodal.fusion_type != 'concat',
    "model.is_causal must be False with fusion_type = 'concat', one stream in "
    "which all see each other; got True: take 'prefix' for a language model.",
  )
  is_global = 'sparse' not in model.attention_pattern
  require(
    multimodal.fusion_type == 'late' or is_global,
    "model.attention_pattern must not hold 'sparse' where the text is fused "
    f'with pictures, got {model.attention_pattern}.',
  )
