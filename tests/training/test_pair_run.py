# SPDX-License-Identifier: Apache-2.0
"""Runs on pictures with captions, by the ordinary commands."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pairs as pairs_lib
import pytest
from lanes import few
from PIL import Image

from jaxsparse import config as c
from jaxsparse import mesh
from jaxsparse.analysis import contact_sheet
from jaxsparse.cli import generate, report, retrieve, train
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, stored, workdir
from jaxsparse.training import evaluation, pairs, step

SIDE, ROWS = 16, 8


def stream(**fields):
  return c.ModelConfig(
    num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=16, **fields,
  )  # fmt: skip


def small(fusion_type='co_attention', **fields):
  is_causal = bool(fields.get('caption_weight'))
  return c.Config(
    model=stream(is_causal=is_causal, vocab_size=40),
    multimodal=c.MultiModalConfig(
      vision=c.VisionConfig(
        stream=stream(is_causal=False), image_size=SIDE, patch_size=8
      ),
      fusion_type=fusion_type,
      fused_dim=8,
      **fields,
    ),
    data=c.DataConfig(
      pairs='generated:shapes', tokenizer='words', seq_len=12, batch_size=ROWS
    ),
    train=c.TrainConfig(num_steps=4, sample_tokens=0),
  )


def hard(config):
  data = dataclasses.replace(config.data, distractors=True)
  return dataclasses.replace(config, data=data)


KINDS = {
  'late': small('late'),
  'hard': hard(small('late')),
  'matching': hard(small(matching_weight=1.0, num_fusion_layers=1)),
  'coca': small(contrastive='infonce', caption_weight=2.0, num_fusion_layers=1),
  'prefix': small('prefix', contrastive_weight=0.0, caption_weight=1.0),
}


def batch(has_wrong=False):
  rng = np.random.default_rng(0)
  length = rng.integers(3, 12, ROWS)[:, None]
  there = np.arange(12)[None] < length
  tokens = np.where(there, rng.integers(2, 40, (ROWS, 12)), 0).astype(np.int32)
  wrong = dict(
    wrong_tokens=np.where(there, tokens[:, ::-1], 0),
    # One row has none.
    wrong_segment_ids=there * np.int32(np.arange(ROWS) != 2)[:, None],
  )
  return dict(
    **(wrong if has_wrong else {}),
    images=rng.uniform(-1, 1, (ROWS, SIDE, SIDE, 3)).astype(np.float32),
    tokens=tokens,
    targets=np.roll(tokens, -1, 1),
    positions=np.where(there, np.arange(12)[None], 0).astype(np.int32),
    segment_ids=there.astype(np.int32),
    loss_weight=there.astype(np.float32),
    item=np.arange(ROWS, dtype=np.int32),
  )


def first_losses(config, *sizes):
  """Losses of two steps on a mesh."""
  devices = jax.devices()[: math.prod(sizes)]
  with jax.set_mesh(mesh.make_mesh(*sizes, devices)):
    state = jax.jit(lambda: step.init_state(config))()
    run = jax.jit(lambda state, x: step.train_step(config, state, x))
    losses = []
    for _ in range(2):
      given = batch(config.data.distractors)
      state, metrics = run(state, evaluation.to_global(given))
      losses.append({k: float(v) for k, v in metrics.items() if 'loss' in k})
    sums = jax.jit(lambda p, x: pairs.embed_step(config, p, x))(
      state.params, evaluation.to_global(batch())
    )
    return losses, np.asarray(sums['image'])


@pytest.mark.parametrize('kind', few(['hard'], list(KINDS)))
def test_several_devices_train_as_one_does(kind):
  """Negatives of other devices count, but drawn ones are a device's own."""
  config = KINDS[kind]
  losses, vectors = first_losses(config, 1, 1, 1)
  spread, vectors_of_eight = first_losses(config, 2, 2, 2)
  if kind == 'matching':
    (one, *_), (other, *_) = losses, spread
    name = 'contrastive_loss'
    np.testing.assert_allclose(other[name], one[name], rtol=2e-4)
    return
  np.testing.assert_allclose(vectors, vectors_of_eight, atol=2e-2)
  for one, other in zip(losses, spread, strict=True):
    assert one.keys() == other.keys()
    for name, value in one.items():
      np.testing.assert_allclose(other[name], value, rtol=2e-4)


def test_the_question_alone_chooses_frames():
  """What is to be predicted may not say where to look."""
  config = small(
    contrastive_weight=0.0, caption_weight=1.0, num_fusion_layers=1,
    num_frames=4, frames_read=1,
  )  # fmt: skip
  given = batch()
  rng = np.random.default_rng(1)
  shape = (ROWS, 4, SIDE, SIDE, 3)
  given['images'] = rng.uniform(-1, 1, shape).astype(np.float32)
  given['segment_ids'] = np.ones((ROWS, 12), np.int32)
  # The last word of the prompt is the fourth token.
  given['loss_weight'] = np.float32(np.arange(12) >= 3)[None].repeat(ROWS, 0)
  given = jax.tree.map(jnp.asarray, given)
  module = pairs.encoder(config)

  @jax.jit
  def shares(params, tokens):
    asking = pairs.asking(config.multimodal, given)
    return module.apply(
      params, tokens, given['images'], given['segment_ids'], asking=asking
    )['shares']

  params = jax.jit(module.init)(
    jax.random.key(0), given['tokens'], given['images']
  )
  tokens = given['tokens']
  first = shares(params, tokens)
  answer, question = (
    np.where((np.arange(12) >= 4) == is_answer, (tokens + 7) % 40, tokens)
    for is_answer in (True, False)
  )
  np.testing.assert_allclose(shares(params, answer), first, atol=1e-6)
  assert np.abs(shares(params, question) - first).max() > 1e-3


def run(folder, *flags):
  train.main(
    [
      f'--config={folder.parent / "recipe.py"}',
      f'--workdir={folder}',
      f'--config.data.cache_dir={folder.parent / "cache"}',
      '--config.train.log_every=1',
      '--config.train.save_every=2',
      *flags,
    ]
  )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run that has learned to find and to tell pictures of its own folder."""
  folder = tmp_path_factory.mktemp('pairs')
  colours = dict(red=(220, 0, 0), blue=(0, 0, 220), green=(0, 160, 0))
  (folder / 'data' / 'images').mkdir(parents=True)
  lines = []
  for i in range(30):
    name, colour = list(colours.items())[i % 3]
    pixels = np.full((20, 20, 3), colour, np.uint8)
    pixels[:2, : i % 10] = 255
    Image.fromarray(pixels).save(folder / 'data' / 'images' / f'{i}.png')
    lines.append({'image': f'{i}.png', 'caption': f'{name} plate'})
  text = '\n'.join(map(json.dumps, lines))
  (folder / 'data' / 'captions.jsonl').write_text(text)
  recipe = """
import dataclasses
from jaxsparse import config as c
def get_config():
  def stream(**fields):
    return c.ModelConfig(num_layers=1, model_dim=16, num_heads=2,
      num_kv_heads=2, head_dim=8, mlp_dim=16, **fields)
  return c.Config(
    model=stream(),
    multimodal=c.MultiModalConfig(
      vision=c.VisionConfig(stream=stream(is_causal=False), image_size=16,
        patch_size=8), num_fusion_layers=1, fused_dim=8, caption_weight=1.0),
    data=c.DataConfig(pairs='PAIRS', validation_fraction=0.2,
      tokenizer='words', seq_len=8, batch_size=8),
    optimizer=c.OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    train=c.TrainConfig(num_steps=40, sample_tokens=0))
""".replace('PAIRS', str(folder / 'data'))
  (folder / 'recipe.py').write_text(recipe)
  run(folder / 'run')
  return folder


def test_a_folder_of_pictures_is_learned(trained, capsys, monkeypatch):
  rows = [
    json.loads(line)
    for line in (trained / 'run' / 'metrics.jsonl').read_text().splitlines()
  ]
  losses = [row['caption_loss'] for row in rows if 'caption_loss' in row]
  assert losses[-1] < 0.2 < losses[0]
  assert rows[-1]['validation_captions_recall_at_1'] == 1
  for folder, flag in (
    ('run', '--text=blue plate'),
    ('run', f'--image={trained / "data" / "images" / "1.png"}'),
  ):
    retrieve.main([f'--workdir={trained / folder}', flag, '--number=3'])
    told = capsys.readouterr().out
    assert told.count('blue plate') == 3
    assert (trained / 'run' / 'plots' / retrieve.SHEET).exists()
  generate.main(
    [
      f'--workdir={trained / "run"}', '--temperature=0',
      f'--image={trained / "data" / "images" / "2.png"}',
    ]
  )  # fmt: skip
  assert capsys.readouterr().out.strip() == 'green plate'
  retrieve.main(
    [f'--workdir={trained / "run"}', '--text=red plate', '--attention']
  )
  assert (trained / 'run' / 'plots' / retrieve.ATTENTION).exists()
  monkeypatch.setattr(contact_sheet, 'MOST', 2)
  retrieve.main([f'--workdir={trained / "run"}', '--text=plate', '--number=9'])
  assert '(the best 2 of these 9)' in capsys.readouterr().out
  with Image.open(trained / 'run' / 'plots' / retrieve.SHEET) as sheet:
    assert sheet.width < 400
  report.main([str(trained / 'run')])


def test_other_pairs_are_searched_whole(trained, tmp_path, capsys):
  """Whatever the run holds out, and nobody knows what it saw of them."""
  run = tmp_path / 'run'
  shutil.copytree(trained / 'run', run)
  config = json.loads((run / 'config.json').read_text())
  config['data'] |= dict(held_out='group', without='plate', test_fraction=0.1)
  (run / 'config.json').write_text(json.dumps(config))
  captions = ['green plate', 'green plate ' * 9]
  for number in (1, 2):
    lines = [
      dict(image=f'{i:03}.png', caption=captions[i]) for i in range(number)
    ]
    folder = pairs_lib.write_folder(tmp_path / str(number), lines)
    retrieve.main(
      [f'--workdir={run}', '--text=green shiny plate', f'--pairs={folder}']
    )
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == number + 1
    assert 'trained on' not in told.out
    assert 'held out' not in told.out
    assert "--text holds words that this model's tokenizer" in told.err
    assert told.err.count("all one to it: 'shiny'") == 1
    assert ('1 of 2 captions have more tokens' in told.err) == (number == 2)
  videos = [dict(frames=['000.png', '001.png'], caption='red plate')]
  pairs_lib.write_folder(tmp_path / 'videos', videos, 2)
  pairs_lib.write_folder(tmp_path / 'own', captions[:0])
  for flags, sentence in (
    ([f'--pairs={tmp_path / "videos"}'], 'are videos of 2 frames'),
    (['--pairs=generated:frames'], 'are videos of 16 frames'),
    ([f'--pairs={tmp_path / "own"}'], '--pairs = .* holds no pairs'),
    ([f'--pairs={folder}', '--among=held_out'], 'holds others: leave it'),
  ):
    with pytest.raises(UserError, match=sentence):
      retrieve.main([f'--workdir={run}', '--text=plate', *flags])


def test_pairs_that_came_later_are_not_said_to_be_learned(
  trained, tmp_path, capsys
):
  run, folder = tmp_path / 'run', tmp_path / 'data'
  shutil.copytree(trained / 'run', run)
  shutil.copytree(trained / 'data', folder)
  config = json.loads((run / 'config.json').read_text())
  config['data']['pairs'] = str(folder)
  (run / 'config.json').write_text(json.dumps(config))
  asked = [f'--workdir={run}', '--text=red plate', '--number=30']
  retrieve.main([*asked, '--among=held_out'])
  told = capsys.readouterr().out
  assert 'held out' in told
  assert 'trained on' not in told
  with (folder / 'captions.jsonl').open('a') as file:
    file.write('\n' + json.dumps(dict(image='30.png', caption='a red one')))
  (folder / 'images' / '30.png').write_bytes(pairs_lib.png(3))
  retrieve.main(asked)
  assert 'trained on' not in capsys.readouterr().out
  with pytest.raises(UserError, match='holds others: leave it out'):
    retrieve.main([*asked, '--among=held_out'])


def test_a_folder_of_videos_is_refused_before_all_are_decoded(
  trained, tmp_path
):
  names = ['000.png', '001.png']
  videos = [
    dict(frames=frames, caption=f'video {i}')
    for i, frames in enumerate((names, names[::-1]))
  ]
  folder = pairs_lib.write_folder(tmp_path / 'videos', videos, 2)
  (folder / 'images' / '001.png').write_bytes(pairs_lib.png(1))
  cache = tmp_path / 'cache'
  with pytest.raises(UserError, match='num_frames must be 2 for'):
    train.main(
      [
        f'--config={trained / "recipe.py"}',
        f'--workdir={tmp_path / "run"}',
        f'--config.data.cache_dir={cache}',
        f'--config.data.pairs={folder}',
      ]
    )
  assert not list(cache.rglob('*.npy'))


def test_a_run_goes_on_as_if_it_had_not_stopped(trained):
  whole, halves = trained / 'run', trained / 'halves'
  shutil.copytree(whole, halves)
  newest = max(stored.steps_in(halves))
  shutil.rmtree(halves / workdir.CHECKPOINTS / str(newest))
  run(halves)
  both = (checkpoint.load_params(folder)[1] for folder in (halves, whole))
  for one, other in zip(*map(jax.tree.leaves, both), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ('command', 'arguments', 'sentence'),
  [
    (generate.main, ['--prompt=red'], 'holds a model of pictures'),
    (retrieve.main, [], 'give --text or --image'),
    (retrieve.main, ['--image=none.png'], 'none.png'),
    (generate.main, ['--image=none.png'], 'none.png'),
    (retrieve.main, ['--text=shiny cars'], "none: 'shiny', 'cars'"),
    (retrieve.main, ['--text=' + 'plate ' * 8], 'than data.seq_len = 8'),
    (
      retrieve.main,
      ['--text=plate', '--out=/proc/x'],
      "out '/proc/x' can't be",
    ),
    (generate.main, ['--image=a', '--image=b'], 'give --image once'),
    (generate.main, ['--image=x.png', '--kv=int8'], '--kv is of language'),
  ],
)
def test_what_a_model_of_pictures_does_not_do(
  trained, command, arguments, sentence
):
  with pytest.raises(UserError, match=sentence):
    command([f'--workdir={trained / "run"}', *arguments])


def test_a_prompt_of_unknown_words_is_refused(trained):
  image = trained / 'data' / 'images' / '2.png'
  with pytest.raises(UserError, match=r"--prompt must .* none: 'shiny'"):
    generate.main(
      [f'--workdir={trained / "run"}', f'--image={image}', '--prompt=shiny']
    )


@pytest.mark.parametrize(
  ('part', 'field', 'value'),
  [
    ('optimizer', 'grad_accumulation', 2),
    ('train', 'sample_tokens', 5),
    ('data', 'pairs', ''),
    ('data', 'batch_size', 1),
  ],
)
def test_settings_that_pairs_do_not_have(part, field, value):
  config = KINDS['late']
  data = dataclasses.replace(config.data, tokenizer='bytes')
  parts = dict(data=data, optimizer=config.optimizer, train=config.train)
  parts[part] = dataclasses.replace(parts[part], **{field: value})
  with pytest.raises(UserError, match=field):
    dataclasses.replace(config, **parts)
