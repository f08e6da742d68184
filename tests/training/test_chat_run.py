# SPDX-License-Identifier: Apache-2.0
"""One command teaches a model of chats to answer, and it stays one."""

import json

import pytest
from chat_tokenizer import CHATML, published
from inference.small_run import save_untrained

from jaxsparse import config as c
from jaxsparse.cli import train
from jaxsparse.config.errors import UserError
from jaxsparse.data import tokenizer_roles

MODEL = c.ModelConfig(
  num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
  mlp_dim=16, vocab_size=300,
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
  """A workdir of a model that knows how to read chats, on other text."""
  folder = tmp_path / 'model'
  folder.mkdir()
  save_untrained(folder, MODEL)
  # Of its own tokenizer only one may be there.
  (folder / 'tokenizer.json').unlink()
  published(
    folder, eos_token='<|im_end|>', bos_token='<|im_start|>',
    chat_template=CHATML,
  )  # fmt: skip
  return folder


@pytest.mark.slow
def test_a_model_of_chats_learns_answers_by_one_command(
  model, tmp_path, capsys
):
  lines = [
    {
      'messages': [
        {'role': 'user', 'content': f'hello {i}?'},
        {'role': 'assistant', 'content': 'user'},
      ]
    }
    for i in range(70)
  ]
  chats = tmp_path / 'chat.jsonl'
  chats.write_text('\n'.join(map(json.dumps, lines)))
  new = tmp_path / 'new'

  def run(*flags):
    train.main(
      [
        f'--config.train.start_from={model}',
        f'--config.data.messages={chats}',
        '--config.data.seq_len=64',
        '--config.data.batch_size=8',
        '--config.optimizer.learning_rate=0.03',
        '--config.optimizer.warmup_steps=2',
        '--config.train.num_steps=60',
        '--config.train.log_every=1',
        '--config.train.sample_prompt=hello 3?',
        '--config.train.sample_tokens=4',
        f'--workdir={new}',
        *flags,
      ]
    )
    return capsys.readouterr().out

  told = run()
  lines_told = (new / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines_told]
  losses = [row['loss'] for row in rows if 'loss' in row]
  # 'user' and its end are two of 300 tokens, and the questions are not learned.
  assert losses[0] > 4
  assert losses[-1] < 0.1
  assert 'A sample:\nhello 3?user' in told
  # What serves the run reads chats as it was trained.
  assert tokenizer_roles.chat_template(new) == CHATML
  # The same command is the same run, and another template another one.
  assert 'step 60' in run()
  other = tmp_path / 'other.jinja'
  other.write_text(CHATML + ' ')
  with pytest.raises(UserError, match='is not the template with which'):
    run(f'--config.data.chat_template={other}')
  chats.write_text('\n'.join(map(json.dumps, lines[1:])))
  with pytest.raises(UserError, match='belongs to a run on another text'):
    run()
