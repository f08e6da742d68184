# SPDX-License-Identifier: Apache-2.0
"""`--config.a.b=value`: what it sets, makes, and says about typos."""

import pytest
from recipes import CONFIGS, RECIPES

from jaxsparse.config import Config, MemoryConfig, MoEConfig, fields
from jaxsparse.config.errors import UserError
from jaxsparse.run import command_line, overrides

DENSE = str(CONFIGS / 'dense.py:tiny')


def read(*flags, recipe=DENSE, say=None):
  return command_line.read_recipe(recipe, flags, say or (lambda note: None))


@pytest.mark.parametrize('form', ['={}', ' {}'])
def test_sets_a_field(form):
  flags = f'--config.model.num_layers{form.format(6)}'.split(' ')
  assert read(*flags).model.num_layers == 6


def test_a_field_alone_is_true():
  assert read('--config.model.use_remat').model.use_remat
  config = read('--config.model.use_remat', '--config.train.num_steps', '9')
  assert config.model.use_remat
  assert config.train.num_steps == 9


def test_the_last_of_two_holds():
  flags = [f'--config.train.num_steps={n}' for n in (3, 4)]
  assert read(*flags).train.num_steps == 4


def test_values_may_have_any_sign_in_them():
  prompt = 'a=b --config.x "c"'
  config = read(f'--config.train.sample_prompt={prompt}')
  assert config.train.sample_prompt == prompt


def test_what_is_no_override_is_left():
  found, others = overrides.split(
    ['--workdir=w', '--config.a=1', 'word', '--config=x', '--config.b', '2']
  )
  assert found == [('a', '1'), ('b', '2')]
  assert others == ['--workdir=w', 'word', '--config=x']


PARTS = {
  'model.memory': (['model.memory.num_keys=64'], MemoryConfig(num_keys=64)),
  'model.moe': (['model.moe.num_experts=4'], MoEConfig(num_experts=4)),
  'model.dcmha': (['model.dcmha.rank=3'], None),
  'model.sparse': (
    ['model.sparse.block=32', 'model.sparse.tile=32',
     'model.attention_pattern=sparse'],
    None,
  ),
}  # fmt: skip


@pytest.mark.parametrize('part', PARTS)
def test_a_part_that_is_not_there_is_made_and_said(part):
  settings, expected = PARTS[part]
  notes = []
  config = read(*(f'--config.{s}' for s in settings), say=notes.append)
  made = getattr(config.model, part.partition('.')[2])
  assert expected is None or made == expected
  path, _, value = settings[0].partition('=')
  assert getattr(made, path.rpartition('.')[2]) == int(value)
  (note,) = notes
  assert note.startswith(f'The recipe has no {part}, so --config.{path} ')
  assert note.endswith(f'--help={part.partition(".")[2]}.')


def test_every_part_that_may_be_absent_is_made():
  """By setting any field of it to its default, at most with a pattern."""
  for path in fields.paths(Config):
    *parts, name = path.split('.')
    config = Config()
    expected, num_made = config, 0
    for part in parts:
      cls = fields.part_of(fields.hints(type(expected))[part])
      found = getattr(expected, part)
      num_made += found is None
      expected = cls() if found is None else found
    if not num_made:
      continue
    notes = overrides.apply(config, [(path, str(getattr(expected, name)))])
    assert len(notes) == num_made
    for part in parts:
      config = getattr(config, part)
    assert config == expected


def test_train_says_so_on_stderr(capsys):
  flags = [
    f'--config={DENSE}',
    '--workdir=w',
    '--config.model.moe.num_experts_per_token=1',
  ]
  config, workdir = command_line.parse_recipe('', flags)
  assert config.model.moe == MoEConfig(num_experts_per_token=1)
  assert workdir == 'w'
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith('The recipe has no model.moe, so ')


def test_defaults_that_do_not_fit_the_recipe_are_named():
  with pytest.raises(UserError, match='a placement must name blocks below num'):
    read('--config.model.memory.num_keys=64', '--config.model.num_layers=2')


def test_a_part_may_be_taken_away():
  flags = [f'--config.model.memory={None}', '--config.optimizer.'
           'value_lr_multiplier=1']  # fmt: skip
  recipe = str(CONFIGS / 'ultramem.py:tiny')
  assert read(*flags, recipe=recipe).model.memory is None


TYPOS = {
  'model.nlayers': 'model.num_layers',
  'num_layers': 'model.num_layers',
  'modl.num_layers': 'model.num_layers',
  'model.num-layers': 'model.num_layers',
  'memory.num_keys': 'model.memory.num_keys',
  'model.num_keys': 'model.memory.num_keys',
  'train.learning_rate': 'optimizer.learning_rate',
  'train.num_stps': 'train.num_steps',
  'model.memory.placements.0': 'model.memory.placements',
}


@pytest.mark.parametrize('typo', TYPOS)
def test_typos_are_met_with_what_was_meant(typo):
  meant = f'(did you mean --config.{TYPOS[typo]}?)'
  with pytest.raises(UserError) as raised:
    read(f'--config.{typo}=3')
  assert str(raised.value).startswith(f'there is no field --config.{typo} ')
  assert meant in str(raised.value)


@pytest.mark.parametrize('path', ['', '.', '.x', 'xyzxyz', 'é', '__class__'])
def test_nothing_is_meant_by_nonsense(path):
  with pytest.raises(UserError) as raised:
    read(f'--config.{path}=1')
  assert 'did you mean' not in str(raised.value)


@pytest.mark.parametrize(
  ('flag', 'meant'),
  [
    ('--train.num_steps=3', '--config.train.num_steps'),
    ('--num_steps=3', '--config.train.num_steps'),
    ('--wrokdir=x', '--workdir'),
    ('--proces_id=1', '--process_id'),
    ('-workdir=x', '--workdir'),
  ],
)
def test_flags_that_lack_something(flag, meant):
  flags = [f'--config={DENSE}', '--workdir=w', flag]
  with pytest.raises(UserError) as raised:
    command_line.parse_recipe('', flags)
  assert f'there is no flag {flag.partition("=")[0]} ' in str(raised.value)
  assert f'(did you mean {meant}?)' in str(raised.value)


@pytest.mark.parametrize('part', ['model', 'model.memory', 'optimizer'])
def test_a_part_is_no_field(part):
  with pytest.raises(UserError, match='has fields of its own: set one of them'):
    read(f'--config.{part}=3')


@pytest.mark.parametrize('name', ['dense:tiny', 'ultramem_v2:tiny'])
def test_recipes_have_names(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert command_line.read_recipe(name) == RECIPES[name]()


@pytest.mark.parametrize(
  'name',
  ['dense_tny', 'configs/dense_tny.py', 'cnf/dense_tny', 'dense-tiny'],
)
def test_a_recipe_that_was_meant_is_named(name):
  with pytest.raises(UserError) as raised:
    command_line.read_recipe(name)
  assert f'--config={name} is no file' in str(raised.value)
  assert '(did you mean dense:tiny?)' in str(raised.value)


@pytest.mark.parametrize('name', ['a\0b', 'x' * 5000, '~nobody-here/x', 'a\nb'])
def test_names_that_no_file_can_have(name):
  with pytest.raises(UserError) as raised:
    command_line.read_recipe(name)
  assert '\n' not in str(raised.value)


HELP = {
  ('--help',): 'Start here:',
  ('-h',): 'dense:tiny, ',
  ('--help=memory',): '--config.model.memory.num_keys=128',
  ('--help', 'moe'): '--config.model.moe.num_experts=8',
  ('--config=x', '--help=all'): '--config.mesh.model=1',
}


@pytest.mark.parametrize('flags', HELP)
def test_help_is_printed_and_all_ends(flags, capsys):
  with pytest.raises(SystemExit) as ended:
    command_line.parse_recipe('What it does.', flags)
  assert ended.value.code == 0
  assert HELP[flags] in capsys.readouterr().out


def test_help_of_no_part_is_a_sentence():
  with pytest.raises(UserError, match=r'did you mean memory\?'):
    command_line.parse_recipe('', ['--help=memry'])
