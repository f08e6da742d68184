# SPDX-License-Identifier: Apache-2.0
"""How many parameters are annotated; `conftest` checks that they are so."""

import ast
import importlib
import inspect
import pathlib

import pytest

import jaxsparse

OPS = pathlib.Path(jaxsparse.__file__).parent / 'ops'

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(function: Function) -> list[ast.arg]:
  given = function.args
  named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
  rest = [arg for arg in (given.vararg, given.kwarg) if arg]
  return [arg for arg in named + rest if arg.arg not in ('self', 'cls')]


def functions(tree: ast.AST) -> list[Function]:
  return [node for node in ast.walk(tree) if isinstance(node, Function)]


def public_functions(name: str) -> list[Function]:
  """The function of that name, or the methods of the class that others call."""
  home = importlib.import_module(getattr(jaxsparse, name).__module__)
  (found,) = [
    node
    for node in ast.parse(inspect.getsource(home)).body
    if getattr(node, 'name', '') == name
  ]
  if isinstance(found, Function):
    return [found]
  return [
    node
    for node in found.body
    if isinstance(node, Function)
    and (node.name == '__call__' or not node.name.startswith('_'))
  ]


def test_parameters_of_ops():
  annotated = [
    arg.annotation is not None
    for path in OPS.rglob('*.py')
    for function in functions(ast.parse(path.read_text()))
    for arg in parameters(function)
  ]
  assert sum(annotated) / len(annotated) >= 0.85


@pytest.mark.parametrize('name', sorted({*jaxsparse.__all__} - {'__version__'}))
def test_public_names(name):
  for function in public_functions(name):
    bare = [a.arg for a in parameters(function) if a.annotation is None]
    assert not bare, f'{function.name}: {bare}'
    assert function.returns, f'{function.name} does not say what it returns'
