# SPDX-License-Identifier: Apache-2.0
"""`model-server`: its flags, its key, its metrics."""

import socket

import pytest
from commands import exit_code
from running import running

from jaxsparse.cli import command as cli
from jaxsparse.config.errors import UserError
from jaxsparse.serving import command
from jaxsparse.serving.serve import listen


@pytest.mark.parametrize(
  ('flag', 'sentence'),
  [
    ('--port=70000', '--port must be within 0 and 65535'),
    ('--slots=0', '--slots must be at least 1'),
    ('--max-len=1', '--max-len must be at least 2'),
    ('--memory-fraction=2', '--memory-fraction must be above 0'),
    ('--step=abc', "must be a step or 'best'"),
    ('--api-key=secret', 'there is no flag --api-key (did you mean'),
    ('--api-key-file=none', "can't be read"),
    ('--chat-template=none', "can't be read"),
    ('--host=no.such.host.invalid', "can't be listened at"),
  ],
)
def test_wrong_flags_are_sentences(flag, sentence, capsys):
  assert exit_code(['serve', '--model-path=nowhere', flag]) == 2
  assert sentence in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
  assert exit_code(['serve', f'--model-path={tmp_path}', '--port=0']) == 2
  assert 'holds no config.json' in capsys.readouterr().err


def test_a_port_that_is_taken_is_told():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f'--port={port} can.t be listened at'):
      listen('127.0.0.1', port)


def test_no_more_than_this_machine_is_reached_by_default():
  arguments = command.parse_arguments(['--model-path=x'])
  assert (arguments.host, arguments.port) == ('127.0.0.1', 8080)
  assert arguments.cors_origin == []


def test_checkpoints_stand_for_their_workdir(tmp_path):
  checkpoints = tmp_path / 'run' / 'checkpoints'
  checkpoints.mkdir(parents=True)
  assert command._workdir(str(checkpoints)) == str(tmp_path / 'run')
  assert command._workdir(str(tmp_path / 'run')) == str(tmp_path / 'run')


def test_the_key_is_of_a_file_or_the_environment(tmp_path, monkeypatch):
  monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
  assert command.read_key(None) == ''
  monkeypatch.setenv(command.KEY_VARIABLE, 'of the environment')
  assert command.read_key(None) == 'of the environment'
  file = tmp_path / 'key'
  file.write_text('of the file\n')
  assert command.read_key(str(file)) == 'of the file'
  for wrong in ('', 'é', 'a\nb'):
    file.write_text(wrong)
    with pytest.raises(UserError, match='--api-key-file=') as caught:
      command.read_key(str(file))
    assert not wrong or wrong not in str(caught.value)


def test_the_console_script_is_the_command(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['model-server', '--port=-1'])
  with pytest.raises(SystemExit) as caught:
    cli.model_server()
  assert caught.value.code == 2
  assert '--model-path' in capsys.readouterr().err


def test_all_names_of_metrics(server):
  server.post('/v1/completions', {'prompt': 'ab', 'max_tokens': 3, 'seed': 0})
  server.post('/v1/completions', {'model': 'made up', 'prompt': 'a'})
  text = server.get('/metrics')[2].decode()
  for line in (
    'num_requests_running 0.0',
    'num_requests_waiting 0.0',
    'num_requests_reading 0.0',
    'slots 4.0',
    'queue_tokens 0.0',
    'programs_compiled 3.0',
    'model_step 20.0',
    'prompt_tokens_total 3.0',
    'generation_tokens_total 3.0',
    'wasted_tokens_total 0.0',
    'prefix_cache_queries_total 0.0',
    'prefix_cache_hits_total 0.0',
    'request_success_total{finish_reason="length"} 1.0',
    'requests_rejected_total{code="model_not_found"} 1.0',
    'engine_steps_total{program="plain"} 3.0',
    'time_to_first_token_seconds_count 1.0',
    'inter_token_latency_seconds_count 2.0',
    'e2e_request_latency_seconds_count 1.0',
    'request_prompt_tokens_sum 3.0',
    'request_generation_tokens_sum 3.0',
    'request_queue_time_seconds_count 0.0',
    'batch_occupancy_count 0.0',
  ):
    assert f'jaxsparse_{line}\n' in text
  for name in ('cache_rows_used_ratio', 'engine_heartbeat_age_seconds'):
    assert f'jaxsparse_{name} ' in text
  # What a client makes up is no label.
  assert 'made up' not in text


def test_measures_of_the_engine_are_taken():
  with running() as server:
    observe = server.service.metrics.observe
    observe('step_seconds', 0.25, 'plain')
    observe('batch_occupancy', 3, '')
    observe('request_queue_time_seconds', 1.5, '')
    observe('unknown', 1, '')
    text = server.get('/metrics')[2].decode()
    for line in (
      'step_seconds_sum{program="plain"} 0.25',
      'batch_occupancy_sum 3.0',
      'request_queue_time_seconds_sum 1.5',
    ):
      assert f'jaxsparse_{line}\n' in text


GRAMMARS = [
  ({'response_format': {'type': 'xml'}}, 'must be text, json_object'),
  ({'response_format': {'type': 'json_schema'}}, 'must hold a schema'),
  (
    {
      'response_format': {
        'type': 'json_schema',
        'json_schema': {'name': 'x', 'schema': {'type': 'nothing'}},
      }
    },
    'must be a grammar',
  ),
  ({'guided_regex': '('}, 'must be a grammar'),
  ({'guided_regex': 'a' * (1 << 17)}, 'at most 65,536 characters'),
  (
    {'guided_regex': 'a', 'response_format': {'type': 'json_object'}},
    'exclude each other',
  ),
]


@pytest.mark.parametrize(('wanted', 'sentence'), GRAMMARS)
def test_what_is_no_grammar_is_told(server, wanted, sentence):
  status, body = server.post('/v1/completions', {'prompt': 'a'} | wanted)
  assert status == 400
  assert sentence in body['error']['message']


def test_grammars_reach_the_engine(server):
  schema = {'type': 'object', 'properties': {'a': {'type': 'integer'}}}
  for wanted, kind in (
    ({'guided_regex': '[a-z]+'}, 'regex'),
    ({'response_format': {'type': 'json_object'}}, 'json_object'),
    (
      {
        'response_format': {
          'type': 'json_schema',
          'json_schema': {'name': 'x', 'schema': schema, 'strict': True},
        }
      },
      'json_schema',
    ),
    ({'response_format': {'type': 'text'}}, None),
  ):
    body = {'prompt': 'a', 'max_tokens': 1} | wanted
    assert server.post('/v1/completions', body)[0] == 200
    grammar = server.engine.seen[-1].grammar
    assert (grammar and grammar.kind) == kind
