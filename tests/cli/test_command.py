# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsparse` and what it makes of its first word."""

import pytest
from commands import exit_code

import jaxsparse
from jaxsparse.cli.command import COMMANDS


@pytest.mark.parametrize('argv', [[], ['--help']])
def test_all_commands_are_named(argv, capsys):
  assert exit_code(argv) == 0
  printed = capsys.readouterr().out
  assert all(f'  {name} ' in printed for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_each_has_help_under_its_name(name, capsys):
  assert exit_code([name, '--help']) == 0
  assert name in capsys.readouterr().out


def test_another_name_is_a_sentence(capsys):
  assert exit_code(['genrate']) == 2
  assert "'genrate' (did you mean generate?)" in capsys.readouterr().err


def test_the_version(capsys):
  assert exit_code(['--version']) == 0
  assert capsys.readouterr().out == f'jaxsparse {jaxsparse.__version__}\n'


def test_a_step_is_a_number_or_the_best(capsys):
  assert exit_code(['generate', '--workdir=runs', '--step=abc']) == 2
  assert (
    "--step: must be a step or 'best', got 'abc'" in capsys.readouterr().err
  )


def test_another_flag_is_not_meant_by_itself(capsys):
  assert exit_code(['bench', 'value_bag', '--steps=0']) == 2
  assert 'did you mean --steps?' not in capsys.readouterr().err
