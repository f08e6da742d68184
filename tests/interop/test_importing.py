# SPDX-License-Identifier: Apache-2.0
"""Imported models are the functions that their official programs are."""

import numpy as np
import pytest
from imported import expected, import_into, loaded

EXACT = (
  'llama',
  'llama3_rope',
  'qwen2',
  'qwen3',
  'olmo2',
  'mixtral',
  'olmoe',
  'gpt_neox',
)


@pytest.mark.parametrize('name', EXACT)
def test_logits_are_the_official_ones(name, tmp_path):
  tokens, logits = expected(name)
  params, apply = loaded(import_into(name, tmp_path / 'w'))
  np.testing.assert_allclose(apply(params, tokens), logits, atol=3e-5, rtol=0)
