# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer with markers of chats, and a template that writes them."""

import json

import tokenizers

from jaxsparse.data.tokenizer import load_from_workdir

CHATML = (
  '{% for m in messages %}'
  "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<s>')
END, START, STOP, BOS = range(4)


def published(folder, **config):
  """A byte-level tokenizer with markers, as Hugging Face's folders have it."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.pre_tokenizer, made.decoder = pre, tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=pre.alphabet(), show_progress=False,
    special_tokens=list(SPECIAL),
  )  # fmt: skip
  made.train_from_iterator(
    ['user assistant hello im_start im_end'] * 9, trainer
  )
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return load_from_workdir(folder)
