# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsparse` and what it makes of its first word."""

import pytest
from commands import exit_code

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
