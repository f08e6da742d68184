# SPDX-License-Identifier: Apache-2.0
"""Pictures in the messages of chats: read, or refused in a sentence."""

import base64
import concurrent.futures
import io
import json
import math
import struct
import zlib

import numpy as np
import openai
import pytest
import seeing_run
from commands import exit_code
from fake_engine import FakeEngine
from PIL import Image
from running import NAME, running

from jaxsparse.data.pictures.decode import read_picture
from jaxsparse.serving import pictures
from jaxsparse.serving.model import Model, Sizes
from jaxsparse.serving.pictures import CAPTIONS

CHAT = '/v1/chat/completions'
CONFIG = seeing_run.config()


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


def url_of(content, kind='png'):
  return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def part(url, **more):
  return {'type': 'image_url', 'image_url': {'url': url} | more}


def said(*parts, text='a red'):
  content = [*parts, {'type': 'text', 'text': text}]
  return {'role': 'user', 'content': content}


def bomb():
  """A few bytes that say they are a square of 20,000 pixels."""

  def chunk(name, content):
    crc = zlib.crc32(name + content)
    return (
      struct.pack('>I', len(content)) + name + content + struct.pack('>I', crc)
    )

  size = struct.pack('>IIBBBBB', 20_000, 20_000, 8, 2, 0, 0, 0)
  start = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', size)
  return start + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


@pytest.fixture(scope='module')
def seeing():
  engine = FakeEngine(slots=2)
  with running(engine, template=CAPTIONS, pictures=CONFIG.multimodal) as found:
    yield found


def ask(server, *messages):
  body = {'messages': list(messages), 'max_tokens': 2, 'seed': 0}
  status, answer = server.post(CHAT, body)
  return status, answer


def test_a_picture_stands_before_what_is_said(seeing):
  (picture,) = seeing_run.pictures(1)
  # Of another size than the model's.
  large = np.asarray(Image.fromarray(picture).resize((40, 40), 0))
  for url, pixels in (
    (url_of(png(picture)), picture),
    # What a file is, it says itself.
    (url_of(png(large), 'JPEG'), read_picture(png(large), seeing_run.SIDE)),
  ):
    status, answer = ask(seeing, said(part(url, detail='high')))
    assert status == 200, answer
    job = seeing.engine.seen[-1]
    assert job.tokens == (256, *b'a red')
    np.testing.assert_array_equal(job.picture, pixels)
    assert answer['usage']['prompt_tokens'] == 6
  assert ask(seeing, said())[0] == 200
  assert seeing.engine.seen[-1].picture is None


def test_parts_of_text_are_no_one_word(seeing):
  picture = part(url_of(SMALL))
  assert ask(seeing, said({'type': 'text', 'text': 'a'}, picture))[0] == 200
  assert seeing.engine.seen[-1].tokens == (256, *b'a\na red')


SMALL = png(seeing_run.pictures(1)[0])
WRONG = {
  'https://example.com/a.png': 'is an address, and nothing is fetched here',
  'HTTP://example.com/a.png': 'is an address, and nothing is fetched here',
  'file:///etc/passwd': 'is an address, and nothing is fetched here',
  'data:text/html;base64,aGk=': 'url must be "url": "data:image/png;base64',
  'data:image/png,abc': 'url must be "url": "data:image/png;base64',
  '': 'url must be "url": "data:image/png;base64',
  'data:image/png;base64,a': 'is no base64',
  'data:image/png;base64,YQ==\n': 'is no base64',
  'data:image/png;base64,': 'is empty',
  url_of(b'hello'): 'is no picture of a known format',
  url_of(b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'svg+xml'): (
    'is no picture of a known format'
  ),
  url_of(SMALL[: len(SMALL) // 2]): 'is broken',
  url_of(bomb()): 'at most 16,777,216 pixels in all, such as 4,096 x 4,096',
}


@pytest.mark.parametrize('url', WRONG)
def test_what_is_no_picture_is_told(seeing, url):
  status, answer = ask(seeing, said(part(url)))
  error = answer['error']
  assert status == 400, answer
  assert WRONG[url] in error['message']
  assert error['param'] == 'messages[0].content[0].image_url.url'
  assert error['type'] == 'invalid_request_error'


def test_limits_of_size_and_number(seeing, monkeypatch):
  # One of the largest and a text fit into a body.
  letters = math.ceil(pictures.MOST_BYTES / 3) * 4
  assert letters + (1 << 20) < pictures.BODY_MIB << 20
  monkeypatch.setattr(pictures, 'MOST_BYTES', len(SMALL) - 30)
  status, answer = ask(seeing, said(part(url_of(SMALL))))
  assert status == 413
  assert 'send a smaller picture' in answer['error']['message']
  one = part(url_of(SMALL))
  for messages in ([said(one, one)], [said(one), said(one)]):
    status, answer = ask(seeing, *messages)
    assert status == 400
    sentences = 'must hold one picture', 'was trained on no chats'
    assert any(s in answer['error']['message'] for s in sentences)


@pytest.mark.parametrize(
  ('wrong', 'sentence'),
  [
    ({'type': 'image_url'}, 'image_url is missing'),
    ({'type': 'image_url', 'image_url': 'x'}, 'expected object'),
    (part(5), 'messages[0].content[0].image_url.url: expected str'),
    (part('x', size=5), "no field 'size' of messages[0].content[0].image_url"),
    ({'type': 'input_audio', 'input_audio': {}}, 'must be text or image_url'),
  ],
)
def test_parts_of_another_form(seeing, wrong, sentence):
  status, answer = ask(seeing, said(wrong))
  assert status == 400
  assert sentence in answer['error']['message']


def test_a_model_of_text_takes_none():
  with running(template=CAPTIONS) as server:
    status, answer = ask(server, said(part(url_of(SMALL))))
  assert status == 400
  assert answer['error']['param'] == 'messages[0].content'
  assert "got a part of type 'image_url'" in answer['error']['message']


@pytest.mark.parametrize(
  ('flag', 'sentence'),
  [
    ('--quantize=weights=int8', '--quantize is of models of text alone'),
    ('--devices=2', '--devices is of models of text alone'),
    ('--tables=file', '--tables is of models of text alone'),
    ('--history-blocks=0', '--history-blocks is of models of text alone'),
  ],
)
def test_flags_that_a_model_of_pictures_does_not_have(
  tmp_path, flag, sentence, capsys
):
  seeing_run.write_config(tmp_path, CONFIG)
  assert exit_code(['serve', f'--model-path={tmp_path}', '--port=0', flag]) == 2
  told = capsys.readouterr().err
  assert sentence in told
  assert '(' not in told


@pytest.mark.parametrize(
  ('fields', 'sentence'),
  [
    (
      dict(caption_weight=0.0, contrastive_weight=1.0),
      'caption_weight must be above 0',
    ),
    (
      dict(num_frames=2, frame_choice='uniform'),
      'num_frames must be 1 to describe a picture',
    ),
  ],
)
def test_models_that_can_not_be_served(tmp_path, fields, sentence, capsys):
  seeing_run.write_config(tmp_path, seeing_run.config(**fields))
  assert exit_code(['serve', f'--model-path={tmp_path}', '--port=0']) == 2
  assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('fusion_type', ['prefix', 'co_attention'])
def test_texts_are_those_of_generate(fusion_type, tmp_path, capsys):
  """Several at once, with and without pictures, by the official client."""
  workdir = seeing_run.save(tmp_path, seeing_run.config(fusion_type))
  sizes = Sizes(slots=3, chunk=4, prefix_bytes=1 << 20)
  model = Model(str(workdir), sizes, lambda line: None)
  asked = [
    (picture, prompt, seed)
    for picture in seeing_run.pictures(2)
    for prompt, seed in (('', 0), ('a red cir', 1), ('the', 2))
  ]

  def ask(number):
    picture, prompt, seed = asked[number]
    done = client.chat.completions.create(
      model=NAME,
      messages=[said(part(url_of(png(picture))), text=prompt)],
      max_tokens=6,
      temperature=1.0 if seed else 0.0,
      seed=seed,
      n=1,
    )
    return done.choices[0].message.content

  def alone(_):
    body = dict(prompt='the red cat', max_tokens=4, seed=0, temperature=0)
    return server.post('/v1/completions', body)[1]['choices'][0]['text']

  with running(
    model.engine, template=CAPTIONS, pictures=model.pictures
  ) as server:
    while model.engine.state == 'starting':
      server.get('/health')
    assert server.get('/health')[0] == 200, model.engine.failure
    num_programs = server.engine.stats().programs_compiled
    client = openai.OpenAI(base_url=f'{server.url}/v1', api_key='none')
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      others = [pool.submit(alone, i) for i in range(3)]
      texts = list(pool.map(ask, range(len(asked))))
    assert len({other.result() for other in others}) == 1
    stats = server.engine.stats()
    assert stats.programs_compiled == num_programs
    assert stats.steps['see'] == len(asked)
    body = json.loads(server.get('/v1/models')[2])
    assert body['data'][0]['max_model_len'] == seeing_run.LENGTH
  assert len(set(texts)) == len(texts)
  for (picture, prompt, seed), text in zip(asked, texts, strict=True):
    file = tmp_path / 'a.png'
    file.write_bytes(png(picture))
    argv = [
      'generate', f'--workdir={workdir}', f'--image={file}',
      f'--prompt={prompt}', f'--seed={seed}', '--max_tokens=6',
      f'--temperature={1.0 if seed else 0.0}',
    ]  # fmt: skip
    capsys.readouterr()
    assert exit_code(argv) == 0
    assert capsys.readouterr().out == f'{prompt}{text}\n'
