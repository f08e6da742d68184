# SPDX-License-Identifier: Apache-2.0
"""The official client on every route."""

import asyncio
import threading
import time

import openai
import pytest
from fake_engine import FakeEngine
from running import NAME, running

from jaxsparse.data.chat_template import ChatTemplate

KEY = 'secret of the test'
SAID = [{'role': 'user', 'content': 'hi'}]


@pytest.fixture(scope='module')
def server():
  template = ChatTemplate('{% for m in messages %}{{ m.content }}{% endfor %}')
  with running(
    FakeEngine(slots=2, max_queue=2, delay=0.002), key=KEY, template=template
  ) as found:
    yield found


def client_of(server, **more):
  options = {'max_retries': 0, 'api_key': KEY} | more
  return openai.OpenAI(base_url=f'{server.url}/v1', **options)


@pytest.fixture(scope='module')
def client(server):
  return client_of(server)


def test_models(client):
  assert [model.id for model in client.models.list()] == [NAME]
  assert client.models.retrieve(NAME).owned_by == 'jaxsparse'


def test_completions(client):
  done = client.completions.create(
    model=NAME,
    prompt=['abc', 'de'],
    max_tokens=4,
    seed=0,
    n=2,
    logprobs=2,
    echo=True,
    stop=['x'],
    logit_bias={'97': 1},
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    top_p=0.9,
    user='someone',
    extra_body={
      'top_k': 5,
      'min_p': 0.1,
      'repetition_penalty': 1.1,
      'min_tokens': 2,
      'ignore_eos': True,
      'cache_salt': 'x',
    },
  )
  assert [choice.text for choice in done.choices] == [
    'abcabca',
    'abcbcab',
    'dedede',
    'deeded',
  ]
  logprobs = done.choices[0].logprobs
  assert logprobs.text_offset == [0, 0, 1, 2, 3, 4, 5, 6]
  assert logprobs.token_logprobs[0] is None
  assert done.usage.completion_tokens == 16
  assert done.usage.prompt_tokens_details.cached_tokens == 0


def test_evaluations_of_code_send_many_stop_strings(server, client):
  """Such as lm-evaluation-harness, which adds the boundary to a task's own."""
  stop = ['\nclass', '\ndef', '\n#', '\nif', '\nprint', '<|endoftext|>', 'ca']
  done = client.completions.create(
    model=NAME, prompt='abc', max_tokens=6, seed=0, temperature=0, stop=stop
  )
  assert done.choices[0].text == 'ab'
  assert server.engine.seen[-1].stop == tuple(stop)


def test_what_the_engine_is_asked_for(server, client):
  client.completions.create(
    model=NAME,
    prompt='a',
    max_tokens=4,
    seed=7,
    n=2,
    temperature=0.5,
    top_p=0.9,
    logit_bias={'97': 1},
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    extra_body={
      'top_k': 5,
      'min_p': 0.1,
      'repetition_penalty': 1.1,
      'min_tokens': 2,
      'stop_token_ids': [3],
      'include_stop_str_in_output': True,
      'cache_salt': 'x',
    },
  )
  first, second = server.engine.seen[-2:]
  drawn = first.sampling
  assert (drawn.temperature, drawn.top_k, drawn.top_p) == (0.5, 5, 0.9)
  assert (drawn.min_p, drawn.repetition_penalty) == (0.1, 1.1)
  assert (drawn.presence_penalty, drawn.frequency_penalty) == (0.5, -0.5)
  assert (drawn.min_tokens, drawn.logit_bias) == (2, ((97, 1.0),))
  assert (drawn.seed, second.sampling.seed) == (7, 8)
  assert first.stop_token_ids == (3,)
  assert first.include_stop
  assert first.salt == 'x'
  assert first.tokens == (256, 97)


def test_streams(client):
  parts = list(
    client.completions.create(
      model=NAME,
      prompt='abc',
      max_tokens=4,
      seed=0,
      stream=True,
      stream_options={'include_usage': True},
    )
  )
  assert ''.join(p.choices[0].text for p in parts if p.choices) == 'abca'
  assert parts[-1].usage.completion_tokens == 4
  finishes = [p.choices[0].finish_reason for p in parts if p.choices]
  assert finishes == [None, None, None, 'length']


def test_chat(client):
  done = client.chat.completions.create(
    model=NAME,
    messages=[
      {'role': 'system', 'content': 'x'},
      {'role': 'user', 'content': [{'type': 'text', 'text': 'yz'}]},
    ],
    max_completion_tokens=3,
    seed=0,
    logprobs=True,
    top_logprobs=3,
  )
  (choice,) = done.choices
  assert choice.message.content == 'xyz'
  assert choice.logprobs.content[0].token == 'x'
  assert len(choice.logprobs.content[0].top_logprobs) == 3
  parts = client.chat.completions.create(
    model=NAME, messages=SAID, max_tokens=3, seed=0, stream=True
  )
  deltas = [part.choices[0].delta for part in parts]
  assert deltas[0].role == 'assistant'
  assert ''.join(delta.content or '' for delta in deltas) == 'hih'


def test_chats_answer_as_far_as_there_is_room(client):
  done = client.chat.completions.create(model=NAME, messages=SAID, seed=0)
  assert done.usage.total_tokens == 256


def test_more_tokens_than_fit_are_cut(client):
  done = client.completions.create(model=NAME, prompt='a', max_tokens=65_535)
  assert done.choices[0].finish_reason == 'length'
  assert done.usage.total_tokens == 256


@pytest.mark.parametrize(
  ('kind', 'code', 'options'),
  [
    (openai.BadRequestError, 'invalid_value', {'temperature': -1}),
    (openai.BadRequestError, 'context_length_exceeded', {'prompt': 'a' * 999}),
    (openai.NotFoundError, 'model_not_found', {'model': 'gpt-4'}),
    (openai.BadRequestError, 'unknown_field', {'extra_body': {'max_token': 1}}),
  ],
)
def test_errors_have_their_classes(client, kind, code, options):
  with pytest.raises(kind) as caught:
    client.completions.create(**({'model': NAME, 'prompt': 'a'} | options))
  assert caught.value.code == code
  assert caught.value.body['message'].endswith('.')


def test_a_wrong_key_is_told(server):
  with pytest.raises(openai.AuthenticationError) as caught:
    client_of(server, api_key='wrong').models.list()
  assert caught.value.code == 'invalid_api_key'
  assert 'wrong' not in caught.value.body['message'].replace('or wrong', '')


def test_who_is_refused_comes_again(server, client):
  """429 with the seconds to wait, which the client does by itself."""

  def occupy():
    client.completions.create(
      model=NAME,
      prompt='a',
      max_tokens=200,
      n=4,
      extra_body={'ignore_eos': True},
    )

  before = server.engine.stats().generation_tokens
  threads = [threading.Thread(target=occupy) for _ in range(1)]
  for thread in threads:
    thread.start()
  while server.engine.stats().running < 2:
    time.sleep(0.005)
  with pytest.raises(openai.RateLimitError) as caught:
    client.completions.create(model=NAME, prompt='a', max_tokens=1, n=3)
  assert caught.value.code == 'queue_full'
  assert caught.value.response.headers['retry-after'] == '1'
  retrying = client_of(server, max_retries=4)
  done = retrying.completions.create(model=NAME, prompt='a', max_tokens=1, n=3)
  assert len(done.choices) == 3
  for thread in threads:
    thread.join()
  drawn = server.engine.stats().generation_tokens - before
  assert drawn == 4 * 200 + 3


def test_a_stream_that_is_closed_ends_its_job(server, client):
  before = server.engine.stats().cancelled.get('running', 0)
  stream = client.completions.create(
    model=NAME, prompt='a', max_tokens=250, stream=True
  )
  next(iter(stream))
  stream.close()
  server.until_idle(1.0)
  assert server.engine.stats().cancelled['running'] == before + 1


def test_the_asynchronous_client(server):
  async def ask():
    async with openai.AsyncOpenAI(
      base_url=f'{server.url}/v1', api_key=KEY, max_retries=5
    ) as client:

      async def one(i):
        stream = await client.completions.create(
          model=NAME, prompt=f'<{i}>', max_tokens=6, temperature=0, stream=True
        )
        return ''.join([part.choices[0].text async for part in stream])

      return await asyncio.gather(*[one(i) for i in range(3)])

  assert asyncio.run(ask()) == ['<0><0>', '<1><1>', '<2><2>']


@pytest.mark.parametrize('streams', [False, True])
def test_an_engine_that_fails_is_not_asked_again(streams):
  with running(FakeEngine(delay=0.01)) as server:
    client = client_of(server, max_retries=2)
    timer = threading.Timer(
      0.1, setattr, (server.engine, 'fault', RuntimeError('broken'))
    )
    timer.start()

    def ask():
      list(
        client.completions.create(
          model=NAME, prompt='a', max_tokens=200, stream=streams
        )
      )

    with pytest.raises(openai.APIError) as caught:
      ask()
    assert caught.value.code == 'server_error'
    assert 'broken' not in caught.value.message
    assert len(server.engine.seen) == 1
    assert server.get('/health')[0] == 503
    with pytest.raises(openai.InternalServerError) as caught:
      client_of(server).completions.create(model=NAME, prompt='a')
    assert caught.value.status_code == 503
    assert 'retry-after' in caught.value.response.headers
