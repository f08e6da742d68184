# SPDX-License-Identifier: Apache-2.0
"""GGUF: the same model as its folder of safetensors; all kinds of blocks."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import TEMPLATE, write_llama, write_tensors
from imported import expected
from loading import loaded

from jaxsparse.config import ModelConfig, RopeScalingConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import tokenizer_roles
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.interop import gguf_file, importing


def test_logits_are_the_official_ones(tmp_path):
  """With the rows of queries and keys put back, biases of none and a head."""
  opened = gguf_file.open_file(write_llama(tmp_path / 'a.gguf'))
  tokens, logits = expected('llama')
  _, params, apply = loaded(opened)
  np.testing.assert_allclose(apply(params, tokens), logits, atol=3e-5, rtol=0)


def test_the_tokenizer_is_rebuilt(tmp_path):
  opened = gguf_file.open_file(write_llama(tmp_path / 'a.gguf'))
  workdir = tmp_path / 'w'
  assert "an answer ends with '<|im_end|>'" in opened.write_tokenizer(workdir)
  found = load_from_workdir(workdir)
  assert found.begin_id == found.boundary_id == 0
  assert found.stop_ids == (2, 0)
  text = 'the 12 WORDs'
  # One digit is one token, and a user's word is one within others.
  wanted = ['t', 'he', 'Ġ', '1', '2', 'Ġ', 'WORD', 's']
  tokens = dict(opened_tokens(opened, workdir))
  assert found.encode(text).tolist() == [tokens[x] for x in wanted]
  assert found.decode(found.encode(text)) == text
  assert found.encode('<|im_start|>', has_markers=True).tolist() == [1]
  assert tokenizer_roles.chat_template(workdir) == TEMPLATE


def opened_tokens(opened, workdir):
  content = tokenizer_roles.read_json(workdir, 'tokenizer.json')
  return content['model']['vocab']


def test_llama_3_cuts_digits_by_threes_and_begins_with_its_mark(tmp_path):
  more = {
    'tokenizer.ggml.pre': 'llama-bpe',
    'tokenizer.ggml.add_bos_token': None,
    'tokenizer.ggml.eot_token_id': 3,
  }
  opened = gguf_file.open_file(
    write_llama(tmp_path / 'a.gguf', metadata=more.items())
  )
  opened.write_tokenizer(tmp_path / 'w')
  found = load_from_workdir(tmp_path / 'w')
  assert found.begin_id == 1
  assert found.stop_ids == (2, 3, 0)
  assert found.decode(found.encode("it's 1234  ok")) == "it's 1234  ok"


def test_frequencies_of_llama_3_are_known(tmp_path):
  i = np.arange(0, 16, 2)
  plain = 5e5 ** -(i / 16)
  turns = plain * 8192 / (2 * np.pi)
  stays = np.clip((turns - 1) / 3, 0, 1)
  divisors = 1 / (stays + (1 - stays) / 32)
  tensors = {'rope_freqs.weight': divisors.astype(np.float32)}
  metadata = {'llama.rope.freq_base': 5e5}
  path = write_llama(
    tmp_path / 'a.gguf', 'llama3_rope', metadata.items(), tensors.items()
  )
  config = gguf_file.open_file(path).config
  assert config.rope_scaling == RopeScalingConfig(kind='llama3', factor=32.0)
  tensors['rope_freqs.weight'][3] *= 1.01
  path = write_llama(
    tmp_path / 'b.gguf', 'llama3_rope', metadata.items(), tensors.items()
  )
  with pytest.raises(UserError, match=r"is not Llama 3\.1's or 3\.2's"):
    gguf_file.open_file(path)


def test_linear_scaling_is_taken_over(tmp_path):
  more = {'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 4.0}
  path = write_llama(tmp_path / 'a.gguf', metadata=more.items())
  scaling = gguf_file.open_file(path).config.rope_scaling
  assert (scaling.kind, scaling.factor) == ('linear', 4.0)


def _f16(block):
  return np.frombuffer(bytes(block), '<f2').astype(np.float64)


def _q8_0(block):
  return _f16(block[:2])[0] * block[2:].view(np.int8)


def _halves(packed):
  return np.concatenate([packed & 15, packed >> 4]).astype(np.float64)


def _q4_0(block):
  return _f16(block[:2])[0] * (_halves(block[2:]) - 8)


def _q4_1(block):
  scale, least = _f16(block[:4])
  return scale * _halves(block[4:]) + least


def _q4_k(block):
  """256 numbers in 8 groups, with scales and minima of 6 bits."""
  scale, least = _f16(block[:4])
  packed, found = block[4:16].astype(int), []
  for group in range(8):
    if group < 4:
      s, m = packed[group] & 63, packed[group + 4] & 63
    else:
      s = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
      m = packed[group + 4] >> 4 | packed[group] >> 6 << 4
    quarter = block[16 + 32 * (group // 2) :][:32]
    q = quarter >> 4 if group % 2 else quarter & 15
    found.append(scale * s * q - least * m)
  return np.concatenate(found)


def _q6_k(block):
  """256 numbers in 16 groups; two of their six bits stand apart."""
  low, high = block[:128], block[128:192]
  scales, scale = block[192:208].view(np.int8), _f16(block[208:])[0]
  found = np.empty(256)
  for i in range(256):
    half, place = divmod(i, 128)
    quarter, at = divmod(place, 32)
    four = low[64 * half + 32 * (quarter % 2) + at] >> (4 * (quarter // 2)) & 15
    two = high[32 * half + at] >> (2 * quarter) & 3
    found[i] = scale * scales[i // 16] * (int(four | two << 4) - 32)
  return found


BLOCKS = dict(
  Q8_0=(34, 32, _q8_0, [0]),
  Q4_0=(18, 32, _q4_0, [0]),
  Q4_1=(20, 32, _q4_1, [0, 2]),
  Q4_K=(144, 256, _q4_k, [0, 2]),
  Q6_K=(210, 256, _q6_k, [208]),
)


def _source(path):
  return gguf_file.GGUFSource(
    path, gguf_file.read_table(path)[1], ModelConfig(vocab_size=2)
  )


@pytest.mark.parametrize('kind', BLOCKS)
def test_blocks_are_what_their_format_says(tmp_path, kind):
  num_bytes, size, of_block, scales = BLOCKS[kind]
  rng = np.random.default_rng(0)
  content = rng.integers(0, 256, (3, 2, num_bytes), np.uint8)
  for at in scales:
    scale = rng.uniform(-2, 2, (3, 2, 1)).astype('<f2')
    content[..., at : at + 2] = scale.view(np.uint8)
  rows = content.reshape(3, -1)
  path = tmp_path / 'a.gguf'
  write_tensors(path, {'x.weight': (rows, Kind[kind])})
  source = _source(path)
  wanted = [[of_block(block) for block in row] for row in content]
  found = source.read('x.weight')
  assert source.dtype('x.weight') == found.dtype == 'float32'
  assert source.shape('x.weight') == found.shape == (3, 2 * size)
  np.testing.assert_allclose(found, np.reshape(wanted, found.shape), rtol=1e-6)


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1'])
def test_numbers_come_back_as_near_as_their_kind_allows(tmp_path, kind):
  given = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
  rows = gguf.quantize(given, Kind[kind])
  path = tmp_path / 'a.gguf'
  write_tensors(path, {'x.weight': (rows, Kind[kind])})
  found = _source(path).read('x.weight')
  error = np.abs(found - given).max()
  limits = dict(F32=0, F16=2e-3, BF16=2e-2, Q8_0=2e-2, Q4_0=0.4, Q4_1=0.25)
  assert error <= limits[kind]
  assert kind == 'F32' or error > limits[kind] / 50


REFUSED = {
  'architecture': (dict(architecture='qwen2'), {}, 'qwen2.* reads llama'),
  'experts': ({'llama.expert_count': 8}, {}, r'llama\.expert_count = 8'),
  'scaling': ({'llama.rope.scaling.type': 'yarn'}, {}, "type = 'yarn'"),
  'value': ({'llama.attention.value_length': 4}, {}, 'value_length = 4'),
  'unknown': ({'llama.attention.clamp': 3.0}, {}, r'clamp = 3\.0 .* unknown'),
  'lacking': ({'llama.block_count': None}, {}, r'lacks llama\.block_count'),
  'heads': ({'llama.attention.head_count': 0}, {}, 'head_count .* at least 1'),
  'by layer': ({'llama.attention.head_count_kv': [2, 1]}, {}, 'whole number'),
  'parts': ({'split.count': 3}, {}, 'one of 3 parts'),
  'kind': (
    {},
    {'token_embd.weight': (np.zeros((96, 22), np.uint8), Kind.Q5_0)},
    'is of Q5_0',
  ),
  'extra': ({}, {'blk.0.attn_q.bias': np.zeros(32, np.float32)}, 'also holds'),
  'missing': ({}, {'blk.1.ffn_up.weight': None}, r'lacks model\.layers\.1'),
  'shape': (
    {},
    {'blk.1.ffn_up.weight': np.zeros((71, 32), np.float32)},
    r'shape \[72, 32\]',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_a_llama_is_refused(tmp_path, case):
  metadata, tensors, words = REFUSED[case]
  path = write_llama(
    tmp_path / 'a.gguf', metadata=metadata.items(), tensors=tensors.items()
  )
  with pytest.raises(UserError, match=words):
    importing.import_model(gguf_file.open_file(path), tmp_path / 'w')
  assert not list((tmp_path / 'w').glob('*'))


@pytest.mark.parametrize(
  ('metadata', 'words'),
  [
    ({'tokenizer.ggml.model': 'bert'}, "model = 'bert'"),
    ({'tokenizer.ggml.pre': 'falcon'}, "pre = 'falcon'"),
    ({'tokenizer.ggml.token_type': [3]}, 'as many'),
    ({'tokenizer.ggml.tokens': 7}, 'must be a list, got 7'),
    ({'tokenizer.ggml.merges': [1, 2]}, 'tokenizer in a.gguf is damaged'),
    ({'tokenizer.ggml.merges': ['no merge']}, 'tokenizer in a.gguf is damaged'),
    ({'tokenizer.ggml.pre': [1, 2]}, 'cuts texts'),
  ],
)
def test_other_tokenizers_are_refused(tmp_path, metadata, words):
  path = write_llama(tmp_path / 'a.gguf', metadata=metadata.items())
  with pytest.raises(UserError, match=words):
    gguf_file.open_file(path).write_tokenizer(tmp_path / 'w')


def test_a_file_may_have_no_tokenizer(tmp_path):
  path = write_llama(tmp_path / 'a.gguf', tokens=False)
  opened = gguf_file.open_file(path)
  assert opened.config.vocab_size == 96
  assert 'has no tokenizer' in opened.write_tokenizer(tmp_path / 'w')


@pytest.mark.parametrize('share', [0.0, 0.001, 0.02, 0.2, 0.6, 0.999])
def test_a_file_that_is_cut_off_is_told(tmp_path, share):
  path = write_llama(tmp_path / 'a.gguf')
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  with pytest.raises(UserError, match=r'a\.gguf.* cut off'):
    gguf_file.open_file(path)
