# SPDX-License-Identifier: Apache-2.0
"""Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build`."""

import re

import jaxsparse

project = 'jaxsparse'
author = 'The jaxsparse authors'
copyright = '2026, the jaxsparse authors. Apache-2.0'
release = version = jaxsparse.__version__

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
]
myst_enable_extensions = ['colon_fence', 'dollarmath', 'attrs_block']
myst_heading_anchors = 3
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = 'jaxsparse'
# In a page of ours as in the source: words, not links.
default_role = 'code'
highlight_language = 'bash'
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
add_module_names = False


def setup(app):
  app.connect('autodoc-process-docstring', _escape)


def _escape(app, what, name, obj, options, lines):
  """Shapes such as [*S, D] are no emphasis, and `RowGradient`s no error."""
  del app, what, name, obj, options
  for i, line in enumerate(lines):
    line = re.sub(r'\*(?=\w)', r'\\*', line)
    # Pair by pair, as a name's end is no beginning.
    lines[i] = re.sub(
      r'(`[^`]+`)(\w?)', lambda m: m[1] + (m[2] and rf'\ {m[2]}'), line
    )
