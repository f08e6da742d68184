# SPDX-License-Identifier: Apache-2.0
"""Pictures beside text: two towers, and what fuses them.

  python train.py --config=configs/multimodal.py:shapes --workdir=runs/shapes
  jaxsparse retrieve --workdir=runs/shapes --text='a red circle'

Pictures of 32 pixels in patches of 8, two blocks of width 64 in each tower.

emoji
  Reproduces: SigLIP's two towers and loss (arXiv:2303.15343) on the 3,655 emoji
  that `jaxsparse convert emoji` takes from a font and from Unicode's names:
  --config.data.pairs=FOLDER.
  Hardware: two CPU cores, minutes.
  Result: seed 0, of 366 held-out emoji, of which skin tones of one person lie
  on both sides: from picture to name R@1 0.560 and R@10 0.654, back 0.557 and
  0.664. A linear map of the pixels has 0.470 and 0.665, chance 0.003 and 0.027.

shapes
  Reproduces: ViLBERT's co-attention (arXiv:1908.02265) with a matching loss on
  hard negatives (arXiv:2107.07651), on captions whose words say what is there
  and whose order says where.
  Hardware: two CPU cores, minutes.
  Result: seed 0, of 419 held-out pictures: R@1 0.788 from picture to caption;
  45.1 % of the captions score above three of the same words, by the matching
  head, chance 25 %: no more than two towers without fusion.

shapes_late
  Reproduces: the same two towers alone, compared by a product.
  Hardware: two CPU cores, minutes.
  Result: seed 0, of 419 held-out pictures: R@1 0.745 from picture to caption;
  47.5 % of the captions score above three of the same words, chance 25 %.

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


def vision(image_size: int, width: int, num_layers: int) -> c.VisionConfig:
  return c.VisionConfig(
    stream=stream(width, num_layers, is_causal=False),
    image_size=image_size,
    patch_size=8,
  )


def train(num_steps: int) -> c.TrainConfig:
  return c.TrainConfig(
    num_steps=num_steps, log_every=20, save_every=200, sample_tokens=0
  )


def emoji() -> c.Config:
  return c.Config(
    model=stream(64, 2, is_causal=False),
    multimodal=c.MultiModalConfig(
      vision=vision(32, 64, 2), fusion_type='late', fused_dim=64
    ),
    data=c.DataConfig(
      pairs='data/emoji',
      validation_fraction=0.1,
      tokenizer='words',
      seq_len=12,
      batch_size=256,
      augment=c.AugmentConfig(shift=0.1, noise=0.05),
    ),
    optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=40),
    train=train(900),
  )


def shapes(fusion_type: str = 'co_attention') -> c.Config:
  is_late = fusion_type == 'late'
  fields = {} if is_late else dict(num_fusion_layers=1, matching_weight=1.0)
  return c.Config(
    model=stream(64, 2, is_causal=False),
    multimodal=c.MultiModalConfig(
      vision=vision(32, 64, 2),
      fusion_type=fusion_type,
      fused_dim=64,
      **fields,
    ),
    data=c.DataConfig(
      pairs='generated:shapes',
      validation_fraction=0.1,
      tokenizer='words',
      seq_len=16,
      batch_size=128,
    ),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=40),
    train=train(600),
  )


def frames(frame_choice: str, frames_read: int, num_steps: int) -> c.Config:
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
    ),
    data=c.DataConfig(
      pairs='generated:frames', tokenizer='words', seq_len=5, batch_size=128
    ),
    optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=40),
    train=train(num_steps),
  )


SIZES = {
  'emoji': emoji,
  'shapes': shapes,
  'shapes_late': lambda: shapes('late'),
  'frames': lambda: frames('uniform', 0, 1200),
  'frames_routed': lambda: frames('routed', 2, 800),
}


def get_config(size: str) -> c.Config:
  return SIZES[size]()
