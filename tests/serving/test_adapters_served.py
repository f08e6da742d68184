# SPDX-License-Identifier: Apache-2.0
"""Adapters that requests choose by the model's name."""

import concurrent.futures
import dataclasses

import pytest
from adapter_folders import write_lora, write_rows
from commands import exit_code
from running import NAME, running
from slot_models import MODELS
from small_run import draw_params, save_untrained

from jaxsparse.config.errors import UserError
from jaxsparse.inference.served_adapters import NoPlace
from jaxsparse.serving.model import Model, Sizes

MODEL = dataclasses.replace(MODELS['small'], vocab_size=257)
COMPLETIONS = '/v1/completions'


@pytest.fixture
def reloaded():
  return []


@pytest.fixture
def server(reloaded):
  def reload(name):
    reloaded.append(name)
    if len(reloaded) == 2:
      raise UserError('the adapter is damaged: copy it again.')
    if len(reloaded) == 3:
      raise NoPlace('texts are still being written: try again.')

  with running(adapters=('cats', 'dogs'), reload=reload) as found:
    yield found


def test_names_are_listed_and_choose(server):
  _, _, content = server.get('/v1/models')
  for name in (b'"id":"cats"', b'"id":"dogs"', f'"id":"{NAME}"'.encode()):
    assert name in content
  assert content.count(f'"parent":"{NAME}"'.encode()) == 2
  assert server.get('/v1/models/cats')[0] == 200
  for name, adapter in (('cats', 'cats'), (NAME, ''), (None, '')):
    body = {'model': name, 'prompt': 'a', 'max_tokens': 1}
    status, answer = server.post(COMPLETIONS, body)
    assert (status, answer['model']) == (200, name or NAME)
    assert server.engine.seen[-1].adapter == adapter
  status, answer = server.post(COMPLETIONS, {'model': 'birds', 'prompt': 'a'})
  assert status == 404
  assert f"'{NAME}' or 'cats' or 'dogs'" in answer['error']['message']


def test_a_folder_is_read_again(server, reloaded):
  def ask(name):
    status, headers, content = server.request(
      'POST', f'/v1/models/{name}/reload'
    )
    return status, headers, content.decode()

  assert ask('cats')[0] == 200
  status, _, content = ask('dogs')
  assert (status, reloaded) == (400, ['cats', 'dogs'])
  assert 'is damaged' in content
  status, headers, content = ask('dogs')
  assert (status, headers['retry-after']) == (503, '5')
  assert 'texts are still being written' in content
  assert ask('birds')[0] == 404
  status, _, content = ask(NAME)
  assert (status, len(reloaded)) == (400, 3)
  assert 'has no folder to read' in content


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp('base')
  return save_untrained(folder, MODEL, deviation=0.3, seq_len=48)


@pytest.mark.parametrize(
  ('entries', 'sentence'),
  [
    (['cats'], '--adapters takes NAME=DIR'),
    (['base=x'], "--adapters has 'base', which is the name of the model"),
    (['cats=nowhere'], "there is no adapter in 'nowhere'"),
    (['a=x', '--adapters', 'a=y'], "--adapters has 'a' twice"),
    (['a=x', '--devices=2'], '--devices must be 1 with --adapters'),
  ],
)
def test_wrong_flags_are_sentences(base, entries, sentence, capsys):
  argv = [f'--model-path={base}', '--port=0', '--served-name=base']
  assert exit_code(['serve', *argv, '--adapters', *entries]) == 2
  assert sentence in capsys.readouterr().err


@pytest.fixture(scope='module')
def folders(base):
  params = draw_params(MODEL, 0.3)
  return dict(
    cats=write_lora(base, params, 'cats', rank=2, targets='(attention|mlp)/'),
    dogs=write_rows(base, params, 'dogs', num_rows=60, deviation=5.0),
  )


@pytest.mark.slow
def test_texts_are_those_of_generate(base, folders, capsys):
  sizes = Sizes(slots=3, chunk=16, prefix_bytes=1 << 20, adapters=folders)
  model = Model(str(base), sizes, lambda line: None)

  def ask(server, name):
    body = dict(prompt='So shaken as we are', max_tokens=12, seed=3)
    body |= {'model': name} if name else {}
    status, answer = server.post(COMPLETIONS, body)
    assert status == 200, answer
    return answer['choices'][0]['text']

  names = [None, *folders]
  with running(
    model.engine, adapters=tuple(folders), reload=model.reload
  ) as server:
    while model.engine.state == 'starting':
      server.get('/health')
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
      texts = list(pool.map(lambda name: ask(server, name), names))
    status, _, content = server.request('POST', '/v1/models/cats/reload')
    assert status == 200, content
    assert [ask(server, name) for name in names] == texts
  assert len(set(texts)) == len(texts)
  for name, text in zip(names, texts, strict=True):
    argv = ['generate', f'--workdir={base}', '--prompt=So shaken as we are']
    argv += ['--max_tokens=12', '--temperature=1', '--seed=3']
    argv += [f'--adapter={folders[name]}'] if name else []
    capsys.readouterr()
    assert exit_code(argv) == 0
    assert capsys.readouterr().out == f'So shaken as we are{text}\n'


@pytest.mark.slow
def test_an_adapter_of_another_base_is_told(folders, tmp_path, capsys):
  other = save_untrained(tmp_path, MODEL, deviation=0.1, seq_len=48)
  argv = [f'--model-path={other}', '--port=0', '--slots=1']
  argv += ['--adapters', f'cats={folders["cats"]}']
  assert exit_code(['serve', *argv]) == 2
  assert 'was trained beside other parameters' in capsys.readouterr().err
