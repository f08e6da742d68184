# SPDX-License-Identifier: Apache-2.0
"""Folders of pairs: read, or refused in a sentence that names the line."""

import json
import pathlib
import re

import numpy as np
import pairs
import pytest

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pictures import decode
from jaxsparse.data.pictures.folder import Folder


def test_captions_groups_and_pictures(tmp_path):
  folder = Folder(pairs.write_folder(tmp_path, pairs.records(3)))
  assert [(p.name, p.captions, p.group) for p in folder.pairs] == [
    ('000.png', ('picture 0', 'red 0'), 'group 0'),
    ('001.png', ('picture 1', 'green 1'), 'group 1'),
    ('002.png', ('picture 2', 'blue 2'), 'group 2'),
  ]
  for pair in folder.pairs:
    np.testing.assert_array_equal(
      folder.picture(pair.number, 8),
      decode.read_picture(pairs.png(pair.number), 8),
    )
  assert len({folder.digest(i) for i in range(3)}) == 3


def test_pictures_may_lie_beside_their_captions_and_in_folders(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'a.png').write_bytes(pairs.png(0))
  line = dict(image='sub/a.png', caption=' a ', prompt='what? ', more=[1])
  (tmp_path / 'captions.jsonl').write_text(json.dumps(line) + '\n\n')
  (pair,) = Folder(tmp_path).pairs
  assert (pair.captions, pair.prompt) == (('a',), 'what? ')
  assert Folder(tmp_path).picture(0, 8).shape == (8, 8, 3)


def test_frames_of_a_video(tmp_path):
  lines = [
    dict(frames=['000.png', '001.png'], caption='first'),
    dict(frames=['002.png', '000.png'], caption='second'),
  ]
  folder = Folder(pairs.write_folder(tmp_path, lines, 3))
  frames = folder.picture(1, 8)
  assert frames.shape == (2, 8, 8, 3)
  np.testing.assert_array_equal(frames[0], decode.read_picture(pairs.png(2), 8))
  assert folder.digest(0) != folder.digest(1)


def test_videos_may_begin_alike(tmp_path):
  frames = [['000.png', '001.png'], ['000.png', '002.png'], ['001.png'] * 2]
  lines = [dict(frames=some, caption=str(some)) for some in frames]
  folder = Folder(pairs.write_folder(tmp_path, lines, 3))
  names = ['000.png', '000.png/002.png', '001.png']
  assert [pair.name for pair in folder.pairs] == names
  lines.append(dict(frames=frames[1], caption='again'))
  pairs.write_folder(tmp_path, lines, 3)
  with pytest.raises(UserError, match=r'as line 2 does: .* of a video in one'):
    Folder(tmp_path)


def test_links_in_circles_and_another_ones_folder(tmp_path, monkeypatch):
  folder = pairs.write_folder(tmp_path, [dict(A, image='a/./000.png')], 1)
  for name in 'ab':
    (folder / 'images' / name).symlink_to('.')
  (pair,) = Folder(folder).pairs
  assert pair.name == 'a/000.png'
  closed, iterdir = folder / 'images' / 'closed', pathlib.Path.iterdir

  def refuse(path):
    if path.name == 'closed':
      raise PermissionError(13, 'Permission denied')
    return iterdir(path)

  monkeypatch.setattr(pathlib.Path, 'iterdir', refuse)
  closed.mkdir()
  assert len(Folder(folder).pairs) == 1
  pairs.write_folder(tmp_path, [dict(A, image='closed/000.png')], 1)
  with pytest.raises(UserError, match=r"closed' cannot be read \(Permission"):
    Folder(folder)


def test_a_video_of_one_frame_is_a_picture(tmp_path):
  lines = [dict(frames=['000.png'], caption='first')]
  folder = Folder(pairs.write_folder(tmp_path, lines))
  assert folder.picture(0, 8).shape == (8, 8, 3)


A, B = dict(image='000.png', caption='a'), dict(image='001.png', caption='b')


@pytest.mark.parametrize(
  ('lines', 'words'),
  [
    ([A, '{"image": "001.png"'], r'line 2 .* no JSON .*, or leave it out\.$'),
    ([A, dict(B, image='./000.png')], "line 2 .* names '000.png', as line 1"),
    ([A, '["001.png", "b"]'], 'line 2 .* is no JSON object: write {"image"'),
    ([A, dict(image='001.png')], 'line 2 .* has no "caption"'),
    ([A, dict(B, captions=['b'])], 'has both "caption" and "captions"'),
    ([A, dict(B, caption='')], "'caption' in line 2 .* is empty"),
    ([A, dict(B, caption=' \n')], "'caption' in line 2 .* is empty"),
    ([A, dict(B, caption=7)], "'caption' in line 2 .* a string, .* got 7"),
    ([A, dict(image='001.png', captions=[])], 'an empty list of captions'),
    ([A, dict(image='001.png', captions=['b', ''])], "'captions' in line 2"),
    ([A, dict(B, caption='\ud800')], 'half a character'),
    ([A, dict(B, group=['x'])], "'group' in line 2 .* must be a string"),
    ([A, dict(B, image='000.png')], "line 2 .* names '000.png', as line 1"),
    ([A, dict(B, image='gone.png')], "line 2 .* names 'gone.png', not found"),
    ([A, dict(B, image='')], "'image' in line 2 .* must name a picture"),
    ([A, dict(B, image=['001.png'])], "'image' in line 2 .* must name a"),
    ([A, dict(B, image='../001.png')], "'../001.png', which must lie in"),
    ([A, dict(B, image='/etc/x.png')], 'which must lie in'),
    ([A, dict(caption='b')], 'line 2 .* has no "image"'),
    ([A, dict(B, frames=['001.png'])], 'has both "image" and "frames"'),
    ([A, dict(frames=['001.png'], caption='b')], 'unlike the first line'),
    (
      [
        dict(frames=['000.png', '001.png'], caption='a'),
        dict(frames=['002.png'], caption='b'),
      ],
      'line 2 .* has 1 frames, unlike the first line with 2',
    ),
    ([], 'holds no pairs: give a folder'),
  ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, lines, words):
  folder = pairs.write_folder(tmp_path / 'pairs', lines, 3)
  config = DataConfig(pairs=str(folder), cache_dir=str(tmp_path / 'cache'))
  with pytest.raises(UserError, match=words) as error:
    build_corpus(config, print)
  sentence = str(error.value)
  assert '\n' not in sentence
  assert sentence.endswith('.')
  assert 'data.text' not in sentence


def test_captions_of_another_encoding_are_refused(tmp_path):
  pairs.write_folder(tmp_path, [A])
  (tmp_path / 'captions.jsonl').write_bytes(json.dumps(A).encode('utf-16'))
  with pytest.raises(UserError, match='UTF-16'):
    Folder(tmp_path)


def test_a_picture_that_goes_later_is_named(tmp_path):
  folder = Folder(pairs.write_folder(tmp_path, [A]))
  path = tmp_path / 'images' / '000.png'
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(UserError, match=f'{re.escape(str(path))}. is broken'):
    folder.picture(0, 8)
  path.unlink()
  with pytest.raises(UserError, match=f'{re.escape(str(path))}. cannot be'):
    folder.picture(0, 8)
