# SPDX-License-Identifier: Apache-2.0
"""A workdir behind HTTP writes what it writes offline."""

import threading
import time

import openai
import pytest
from running import NAME, running
from small_run import save_untrained

from jaxsparse.config import ModelConfig
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.text import Request, complete
from jaxsparse.run import checkpoint
from jaxsparse.serving.model import Model, Sizes, slot_bytes

# A dozen programs are compiled.
pytestmark = pytest.mark.slow

LENGTH = 48


@pytest.fixture(scope='module')
def said():
  return []


@pytest.fixture(scope='module')
def model(tmp_path_factory, said):
  config = ModelConfig(
    num_layers=2, model_dim=32, num_heads=4, mlp_dim=64, vocab_size=257
  )
  # Far from ties: the likeliest token is one by much.
  folder = save_untrained(tmp_path_factory.mktemp('run'), config, 0.5)
  sizes = Sizes(slots=2, length=LENGTH, chunk=8, prefix_bytes=1 << 20)
  found = Model(str(folder), sizes, said.append)
  found.on_ready = said.append
  found.workdir = folder
  return found


@pytest.fixture(scope='module')
def server(model):
  with running(model.engine, metrics=model.metrics) as found:
    while model.engine.state == 'starting':
      assert found.get('/health')[0] == 503
      time.sleep(0.1)
    assert found.get('/health')[0] == 200
    yield found


def offline(model, prompt, temperature, seed, number):
  _, params = checkpoint.load_params(model.workdir)
  request = Request(
    prompt=prompt,
    max_tokens=number,
    sampling=Sampling(temperature=temperature),
    seed=seed,
  )
  return complete(model.config, params, model.tokenizer, request).text


def test_start_tells_what_is_served(server, said, model):
  assert 'more than the 16 tokens of training' in said[0]
  line = said[-1]
  assert line.startswith('step 3, 2 slots of 48 tokens, weights of ')
  assert f'{server.engine.stats().programs_compiled} programs' in line
  assert server.engine.limit == LENGTH
  # Keys and values of two layers, positions and documents.
  assert slot_bytes(model.config, LENGTH) >= LENGTH * (2 * 2 * 32 * 4 + 8)


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_texts_are_those_of_generate(server, model, temperature):
  prompts = ['', 'a', 'hello wor', 'é' * 8]
  wanted = [offline(model, p, temperature, 5, 9) for p in prompts]
  found = {}

  def ask(i):
    _, body = server.post(
      '/v1/completions',
      {
        'prompt': prompts[i],
        'max_tokens': 9,
        'temperature': temperature,
        'seed': 5,
      },
    )
    found[i] = body['choices'][0]['text']

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [found[i] for i in range(4)] == wanted


def test_evaluations_get_their_log_probabilities(server):
  """As lm-evaluation-harness asks, and as it reads the answer."""
  context, rest = [256, 104, 105], [32, 97]
  _, body = server.post(
    '/v1/completions',
    {
      'prompt': [[*context, *rest], [256, *rest]],
      'max_tokens': 1,
      'logprobs': 1,
      'echo': True,
      'temperature': 0,
      'seed': 1234,
    },
  )
  for choice, begin in zip(body['choices'], (len(context), 1), strict=True):
    found = choice['logprobs']
    assert found['tokens'][begin:-1] == [' ', 'a']
    for own, top in zip(
      found['token_logprobs'][begin:-1],
      found['top_logprobs'][begin:-1],
      strict=True,
    ):
      assert own in top.values()
      assert own <= max(top.values()) <= 0


def test_a_prefix_is_read_once(server):
  body = {'prompt': 'x' * 20, 'max_tokens': 1, 'seed': 0}
  first = server.post('/v1/completions', body)[1]
  again = server.post('/v1/completions', body)[1]
  cached = [
    answer['usage']['prompt_tokens_details']['cached_tokens']
    for answer in (first, again)
  ]
  assert cached == [0, 16]
  assert first['choices'] == again['choices']


def test_the_client_and_grammars(server):
  client = openai.OpenAI(base_url=f'{server.url}/v1', api_key='none')
  done = client.completions.create(
    model=NAME,
    prompt='a',
    max_tokens=20,
    seed=0,
    extra_body={'guided_regex': '[0-9]{3}x'},
  )
  text = done.choices[0].text
  assert text[:3].isdecimal()
  assert text[3:] == 'x'
  assert done.choices[0].finish_reason == 'stop'
