# SPDX-License-Identifier: Apache-2.0
"""The page of results about pictures with their texts."""

import numpy as np
from results_tables import load, machine, table

NAME = 'multimodal'
_SIDES = (
  'captions_recall_at_1', 'captions_recall_at_10',
  'pictures_recall_at_1', 'pictures_recall_at_10',
)  # fmt: skip
_HEAD = ['picture -> text R@1', 'R@10', 'text -> picture R@1', 'R@10']
_BASELINES = dict(
  chance='chance', mean_colour='mean colour', pixels_linear='pixels, linear'
)


def _cell(runs, name):
  """Mean of the seeds, and each where there are several."""
  found = [run[name] for run in runs]
  each = f' ({", ".join(f"{v:.3f}" for v in found)})' if len(found) > 1 else ''
  return f'{np.mean(found):.3f}{each}'


def _split(name):
  """Of emoji: a model and what needs none."""
  found = load(NAME)['emoji'][name]
  rows = [['the model', *(_cell(found['runs'], side) for side in _SIDES)]]
  for key, what in _BASELINES.items():
    some = [found['baselines'][key]]
    rows.append([what, *(_cell(some, side) for side in _SIDES)])
  return table(['', *_HEAD], rows)


def _kinds():
  return table(
    [
      'held out', 'number', 'a tone of the same is trained on',
      'have a word of no caption', 'R@1', 'R@10',
    ],
    [
      [name, of['number'], f'{of["sibling"]:.0%}', f'{of["unseen_word"]:.0%}',
       f'{of["recall_at_1"]:.3f}', f'{of["recall_at_10"]:.3f}']
      for name, of in load(NAME)['emoji']['random']['by_kind'].items()
    ],
  )  # fmt: skip


def _shapes(key):
  found = load(NAME)[key]
  return table(
    ['recipe', 'parameters', 'MFLOPs a pair', 'above its distractors', *_HEAD],
    [
      [f'`multimodal:{name}`', of['parameters'], of['mflops'],
       *(_cell(of['runs'], side) for side in ('chosen', *_SIDES))]
      for name, of in found.items()
    ],
  )  # fmt: skip


def pictures():
  emoji, baselines = load(NAME)['emoji'], load(NAME)['shapes_baselines']
  linear = baselines['pixels_linear']
  return f"""# Pictures with their texts

Minutes a run; figures in `results/{NAME}.json` ({machine(NAME)}). Means of seeds, and each of them. Recall is over the whole held-out set.

## Emoji
`jaxsparse train --config=multimodal:emoji --config.data.pairs=FOLDER --config.train.seed=SEED`, of the font and the names that
[the guide](../guides/pictures.md) names: 3,289 pairs to train, 366 held out.

{_split('random')}

Most of it is composition: skin tones of one person lie on both sides. Seed 0 by what is held out, from picture to name:

{_kinds()}

A name whose words no caption had can be found by what is left alone. Harder splits: without skin tones
(`{emoji['without_skin_tones']['flags']}`)

{_split('without_skin_tones')}

and whole sub-groups held out (`{emoji['whole_groups']['flags']}`)

{_split('whole_groups')}

## Shapes
Two shapes of two colours, and what is left of or above what: the three distractors have the same words, so chance is 0.25 of the pairs, and whole
captions are held out. 400 steps of 64 pairs, of which each has one of its distractors as a wrong text, in the contrastive loss and in matching alike.
`jaxsparse train --config=multimodal:shapes --config.train.seed=SEED`:

{_shapes('shapes')}

What is scored is temperature times cosine, with fusion plus the matching head's logit, as `retrieve` orders its best. A linear map of the pixels has
R@1 {linear['captions_recall_at_1']:.3f} from picture to text. The FLOPs are of one pair forward: training with matching fuses three, and to rank n texts
for a picture costs n of them. Towers of two blocks (`--config.model.num_layers=2 --config.multimodal.vision.stream.num_layers=2`) alone have as much as
fused ones of one block, for less, and what fusion adds to them is within what seeds differ by:

{_shapes('shapes_two_blocks')}

## Four shapes
A shape in each quarter of the picture, and captions of any row or column: one vector has to keep all that could be said, and a text that reads the
picture looks where it says. Distractors are as before, chance is 0.25; 1,500 steps of 64 pairs.
`jaxsparse train --config=multimodal:four_shapes --config.train.seed=SEED`:

{_shapes('four_shapes')}

Every seed of fusion is above every one of vectors alone, at 2.7 times the FLOPs. Towers of two blocks, vectors alone
(`--config.model.num_layers=2 --config.multimodal.vision.stream.num_layers=2`):

{_shapes('four_shapes_two_blocks')}

Recall is low for all, as other pictures have what a caption says, too, and count as wrong.
"""
