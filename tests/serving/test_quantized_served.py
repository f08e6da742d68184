# SPDX-License-Identifier: Apache-2.0
"""A quantized model with tables on file behind HTTP, and what it writes."""

import concurrent.futures
import dataclasses
import http.client
import json
import subprocess
import sys
import time

import pytest
from commands import exit_code
from running import running
from slot_models import MODELS
from small_run import save_untrained

from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.inference import batch, row_cache, weights
from jaxsparse.inference.quantize import parse
from jaxsparse.inference.row_cache import Size
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.inference.text import Request
from jaxsparse.ops.tables import host_table
from jaxsparse.serving.model import Model, Sizes

MODEL = dataclasses.replace(MODELS['small'], vocab_size=257)
LENGTH = 48
HOW = 'weights=int8,tables=int4'
# Prompts, temperatures and seeds.
ASKED = [('To', 0.0, 0), ('So shaken as', 1.0, 5), ('', 1.0, 6), ('To', 0.7, 7)]


@pytest.fixture(scope='module')
def old(tmp_path_factory):
  # Far from ties: the likeliest token is one by much.
  folder = tmp_path_factory.mktemp('old')
  return save_untrained(folder, MODEL, deviation=0.5, seq_len=LENGTH)


@pytest.fixture(scope='module')
def new(old, tmp_path_factory):
  folder = tmp_path_factory.mktemp('new') / 'int'
  flags = ['--weights=int8', '--tables=int4', f'--out={folder}']
  assert exit_code(['quantize', str(old), *flags]) == 0
  return folder


def offline(workdir, how):
  """As `generate` writes, with the same flags."""
  model = dataclasses.replace(MODEL, kv_cache='int8')
  tokenizer = ByteTokenizer()
  _, params = weights.load(workdir, model, how=parse(how), tables='file')
  requests = [
    Request(
      prompt=prompt,
      max_tokens=12,
      sampling=Sampling(temperature=temperature),
      seed=seed,
    )
    for prompt, temperature, seed in ASKED
  ]
  programs = batch.prepare(model, params, tokenizer, requests, LENGTH)
  done = batch.complete_all(programs, tokenizer, requests)
  return [text.text for text in done]


def served(workdir, how, **sizes):
  """The same texts, all asked for at once."""
  sizes = dict(slots=len(ASKED), kv='int8', tables='file') | sizes
  said = []
  model = Model(
    str(workdir), Sizes(quantization=parse(how), **sizes), said.append
  )
  model.on_ready = said.append
  with running(model.engine) as server:
    while model.engine.state == 'starting':
      server.get('/health')
      time.sleep(0.05)
    assert model.engine.state == 'ready', model.engine.failure

    def ask(asked):
      prompt, temperature, seed = asked
      body = dict(
        prompt=prompt, temperature=temperature, seed=seed, max_tokens=12
      )
      status, answer = server.post('/v1/completions', body)
      assert status == 200, answer
      return answer['choices'][0]['text']

    with concurrent.futures.ThreadPoolExecutor(len(ASKED)) as pool:
      return list(pool.map(ask, ASKED)), said


@pytest.fixture
def lazily(monkeypatch):
  """Compiles what is needed; sizes are those of generate's programs."""
  compile_ = Programs.compile

  def compile_lazily(*args, **kwargs):
    return compile_(*args, **kwargs | dict(is_lazy=True))

  monkeypatch.setattr(Programs, 'compile', compile_lazily)


@pytest.mark.parametrize('is_saved', [True, False])
def test_texts_are_those_of_generate(old, new, lazily, is_saved):
  workdir, how = (new, '') if is_saved else (old, HOW)
  # Before the server, in which it compiles what a client would wait for.
  expected = offline(workdir, how)
  assert served(workdir, how)[0] == expected
  assert len(set(expected)) == len(expected)
  assert (workdir / 'mapped_tables').is_dir()


@pytest.mark.slow
def test_copies_of_rows_on_a_device_that_fetches_them_change_nothing(
  new, monkeypatch
):
  expected = offline(new, '')
  monkeypatch.setattr(host_table, 'reads_host_memory', lambda: False)
  monkeypatch.setattr(row_cache, '_CALLS', 2)
  texts, _ = served(new, '', cached_rows=Size(rows=20))
  assert texts == expected


@pytest.mark.slow
def test_the_commands_write_the_same(old, capsys):
  flags = ['--tables=file', '--kv=int8', f'--quantize={HOW}']
  process = subprocess.Popen(
    [sys.executable, '-m', 'jaxsparse', 'serve', f'--model-path={old}',
     '--port=0', '--slots=2', '--chunk=16', *flags],
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  try:
    for line in process.stderr:
      if ' programs, at ' in line:
        break
    address = line.split(' at http://')[1].strip()
    assert '2 slots of 48 tokens' in line
    for prompt, temperature, seed in ASKED:
      connection = http.client.HTTPConnection(address, timeout=60)
      body = dict(
        prompt=prompt, temperature=temperature, seed=seed, max_tokens=12
      )
      headers = {'content-type': 'application/json'}
      connection.request('POST', '/v1/completions', json.dumps(body), headers)
      answer = json.loads(connection.getresponse().read())
      argv = [f'--prompt={prompt}', f'--temperature={temperature}']
      argv += [f'--seed={seed}', '--max_tokens=12', f'--workdir={old}', *flags]
      assert exit_code(['generate', *argv]) == 0
      sample = (old / 'samples.jsonl').read_text().splitlines()[-1]
      assert answer['choices'][0]['text'] == json.loads(sample)['text']
  finally:
    process.terminate()
    process.stderr.close()
    assert process.wait(60) == 0
