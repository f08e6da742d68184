# SPDX-License-Identifier: Apache-2.0
"""Which leaves are matrices of a product, and what it sums over.

By the names of module and leaf: nothing else distinguishes them.
"""

# Dimensions that a product sums over. Those of experts have one before them, of
# the experts.
CONTRACTED = {
  ('attention', 'query'): (0,),
  ('attention', 'key'): (0,),
  ('attention', 'value'): (0,),
  ('attention', 'output'): (0, 1),
  **{
    (module, name): (0,)
    for module in ('mlp', 'shared')
    for name in ('gate', 'up', 'down')
  },
  **{('moe', name): (1,) for name in ('gate', 'up', 'down')},
  ('memory', 'query'): (0,),
  ('memory', 'output'): (0, 1),
  ('memory', 'gate'): (0,),
  ('memory', 'pre_value_map'): (0,),
}
# Of the vocabulary.
VOCABULARY = {('embed', 'table'): (1,), ('', 'output'): (1,)}
# Their products are of rows sorted by expert.
EXPERTS = frozenset(name for name in CONTRACTED if name[0] == 'moe')
# The first of them is looked up, too.
LOOKED_UP = ('embed', 'table')


def place_of(path: tuple[str, ...]) -> tuple[str, str]:
  """Names of the module that has a leaf, '' for the model, and of the leaf."""
  return (path[-2] if len(path) > 1 else ''), path[-1]
