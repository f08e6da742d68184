# SPDX-License-Identifier: Apache-2.0
"""Pictures beside text: two towers, and what fuses them.

  python train.py --config=configs/multimodal.py:shapes --workdir=runs/shapes
  jaxsparse retrieve --workdir=runs/shapes --text='a red circle'

Pictures of 32 pixels in patches of 8, blocks of width 64 in each tower.

emoji
  Reproduces: two towers, a small vocabulary of words and CLIP's loss
  (arXiv:2103.00020) on the 3,655 emoji that `jaxsparse convert emoji` takes
  from a font and from Unicode's names: --config.data.pairs=FOLDER.
  Hardware: two CPU cores, minutes.
  Result: seeds 0, 1 and 2, of 366 held-out emoji, of which skin tones of one
  person lie on both sides: from picture to name R@1 0.483, 0.485 and 0.472,
  R@10 0.719, 0.717 and 0.711; a linear map of the pixels has 0.470 and
  0.665, chance 0.003 and 0.027. Without skin tones 0.169, 0.135 and 0.106, and
  0.392, 0.396 and 0.421 (linear 0.096 and 0.347); whole sub-groups held out
  0.023, 0.041 and 0.033, and 0.184, 0.190 and 0.177 (linear 0.008 and 0.062).

shapes
  Reproduces: ViLBERT's co-attention (arXiv:1908.02265) with a matching loss on
  hard negatives (arXiv:2107.07651), on captions whose words say what is there
  and whose order says where.
  Hardware: two CPU cores, minutes.
  Result: seeds 0, 1 and 2, of 413 held-out pictures: 77.7, 78.7 and 78.2 % of
  the captions score above three of the same words, chance 25 %. 7.6 MFLOPs a
  pair.

shapes_late
  Reproduces: the same two towers alone, compared by a product, with the same
  wrong texts (arXiv:2210.01936).
  Hardware: two CPU cores, minutes.
  Result: as above 72.9, 74.8 and 77.0 %. 2.8 MFLOPs a pair; with towers of two
  blocks, of 5.2, 80.1, 80.9 and 77.2 %, to which fusion (10.0) adds nothing:
  83.3, 80.1 and 75.8 %.

four_shapes
  Reproduces: the same as shapes, where a picture has four and a caption names
  two of them: what is asked for is not known before the text is.
  Hardware: two CPU cores, minutes.
  Result: seeds 0, 1 and 2, of 411 held-out pictures: 95.9, 99.8 and 99.3 %,
  chance 25 %.

four_shapes_late
  Reproduces: two towers alone on the same.
  Hardware: two CPU cores, minutes.
  Result: as above 60.8, 63.7 and 69.1 %; with towers of two blocks 38.9, 56.9
  and 54.3 %.

frames
  Reproduces: CoCa's captioning loss (arXiv:2205.01917) on videos of 16 frames,
  of which one has the answer to a question; all of them are read.
  Hardware: two CPU cores, minutes.
  Result: seeds 0 to 2, of 1,024 held-out videos: 99.9, 99.9 and 99.8 % right,
  chance 12.5 %.

frames_routed
  Reproduces: the same with 2 frames read, which the question chooses by their
  mean keys, as MoBA (arXiv:2502.13189) chooses blocks. A first start reads all:
  --config.multimodal.frames_read=0 --config.train.num_steps=600.
  Hardware: two CPU cores, minutes.
  Result: seeds 0 to 2, of 1,024 held-out videos: 99.2, 99.1 and 99.9 % right,
  chance 12.5 %. In 1,200 steps with 2 frames from the first on: seed 0 96.3 %,
  seed 1 30.9 %; with those of frame_choice 'uniform' 23.2 %, 'change' 22.8 %.

frames_covered
  Reproduces: the same with one frame where it has nine tenths of the choice,
  which MoBA's fixed number has not. It goes on from the first start of
  frames_routed.
  Hardware: two CPU cores, minutes.
  Result: as above 99.6, 99.8 and 99.3 % right, with 1.50, 1.57 and 1.50 frames
  read of 16.
"""

from jaxsparse import config as c


def stream(width: int, num_layers: int, **fields) -> c.ModelConfig:
  """Blocks of one tower: heads of 16, a swiglu MLP."""
  return c.ModelConfig(
    num_layers=num_layers,
    model_dim=width,
    num_heads=width // 16,
    num_kv_heads=width // 16,
    head_dim=16,
    mlp='swiglu',
    mlp_dim=2 * width,
    **fields,
  )


def vision(num_layers: int) -> c.VisionConfig:
  return c.VisionConfig(
    stream=stream(64, num_layers, is_causal=False),
    image_size=32,
    patch_size=8,
    positions='sincos',
  )


def train(num_steps: int) -> c.TrainConfig:
  return c.TrainConfig(
    num_steps=num_steps, log_every=20, save_every=200, sample_tokens=0
  )


def emoji() -> c.Config:
  return c.Config(
    model=stream(64, 2, is_causal=False),
    multimodal=c.MultiModalConfig(
      vision=vision(2),
      fusion_type='late',
      fused_dim=64,
      contrastive='infonce',
    ),
    data=c.DataConfig(
      pairs='data/emoji',
      validation_fraction=0.1,
      tokenizer='words',
      seq_len=12,
      batch_size=256,
      augment=c.AugmentConfig(shift=0.1, crop=0.1, noise=0.05, unknown=0.1),
    ),
    optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=40),
    train=train(400),
  )


def shapes(
  fusion_type: str, pairs: str = 'generated:shapes', num_steps: int = 400
) -> c.Config:
  is_late = fusion_type == 'late'
  fields = {} if is_late else dict(num_fusion_layers=1, matching_weight=1.0)
  return c.Config(
    model=stream(64, 1, is_causal=False),
    multimodal=c.MultiModalConfig(
      vision=vision(1),
      fusion_type=fusion_type,
      fused_dim=64,
      **fields,
    ),
    data=c.DataConfig(
      pairs=pairs,
      validation_fraction=0.1,
      tokenizer='words',
      seq_len=12,
      batch_size=64,
      distractors=True,
    ),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=40),
    train=train(num_steps),
  )


def frames(
  frame_choice: str,
  frames_read: int,
  num_steps: int,
  frame_coverage: float = 1.0,
) -> c.Config:
  return c.Config(
    model=stream(64, 1),
    multimodal=c.MultiModalConfig(
      # A frame is one patch.
      vision=c.VisionConfig(
        stream=stream(64, 2, is_causal=False), image_size=16, patch_size=16
      ),
      num_fusion_layers=1,
      fused_dim=64,
      contrastive_weight=0.0,
      caption_weight=1.0,
      num_frames=16,
      frames_read=frames_read,
      frame_choice=frame_choice,
      frame_coverage=frame_coverage,
    ),
    data=c.DataConfig(
      pairs='generated:frames', tokenizer='words', seq_len=5, batch_size=128
    ),
    optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=40),
    train=train(num_steps),
  )


SIZES = {
  'emoji': emoji,
  'shapes': lambda: shapes('co_attention'),
  'shapes_late': lambda: shapes('late'),
  'four_shapes': lambda: shapes('co_attention', 'generated:four_shapes', 1500),
  'four_shapes_late': lambda: shapes('late', 'generated:four_shapes', 1500),
  'frames': lambda: frames('uniform', 0, 1200),
  'frames_routed': lambda: frames('routed', 2, 800),
  'frames_covered': lambda: frames('routed', 2, 800, frame_coverage=0.9),
}


def get_config(size: str) -> c.Config:
  return SIZES[size]()
