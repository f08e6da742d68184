# SPDX-License-Identifier: Apache-2.0
"""Trains a language model.

  python train.py --config=configs/ultramem.py:tiny --workdir=runs/ultramem_tiny

The same command goes on where it was stopped. With several hosts, start it on
each: with --distributed, which finds the others on Cloud TPU and under SLURM,
Open MPI and Kubernetes; elsewhere with --coordinator=HOST:PORT (of process 0),
--num_processes=N and --process_id=I. They wait --wait_seconds=300 for each
other, and one that fails ends all. Every field of a recipe can be set on the
command line.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.analysis import hardware, run_cost, run_pictures
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.data import compression, tokenizer
from jaxsparse.data.chat_template import ChatTemplate, RefusedError
from jaxsparse.data.corpus import Corpus, build_corpus
from jaxsparse.inference import adapters, decoding, quantize, sampling, text
from jaxsparse.nn import block
from jaxsparse.nn.memory import tables as memory_tables
from jaxsparse.nn.transformer import init_params
from jaxsparse.run import (
  command_line,
  compiled_programs,
  hosts,
  metrics,
  workdir_lock,
)
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.progress import Reporter
from jaxsparse.training import (
  loop,
  old_text,
  optimizer,
  ranked_texts,
  resume,
  same_start,
  start_from,
  trained_rows,
)
from jaxsparse.training.evaluation import Validation
from jaxsparse.training.inputs import (
  training_data,
  with_answers,
  with_vocabulary,
)

# How the sample at the end is drawn.
SAMPLING = sampling.Sampling(temperature=0.8)


def main(argv: Sequence[str]) -> None:
  config, workdir = command_line.parse_recipe(__doc__, argv)
  optimizer.require_known(config.optimizer)
  quantize.parse(config.adapter.quantize, 'adapter.quantize')
  same_start.require_same_program(config, workdir)
  reporter = Reporter(is_silent=not hosts.is_process_zero())
  with workdir_lock.held(workdir, reporter.say):
    train(config, workdir, reporter)


def train(config: Config, workdir: str, reporter: Reporter) -> None:
  """Trains in a workdir that no other start has."""
  say = reporter.say
  with hosts.process_zero_first():
    config, changes = resume.open_workdir(config, workdir, say)
    for change in changes:
      say(f'Changed since the last start: {change}.')
    config = start_from.begin(config, workdir, say)
    compiled_programs.keep(config.data.cache_dir, say)
    corpus = build_corpus(config.data, say)
    resume.require_same_data(config, corpus, workdir)
    resume.require_tokenizer(config, workdir)
    tokens = tokenizer.make_tokenizer(
      config.data, corpus, workdir, config.model.vocab_size
    )
    config = with_vocabulary(config, tokens.vocab_size)
    corpus, template = with_answers(config.data, corpus, tokens, workdir, say)
    corpus = old_text.beside(config, corpus, tokens, workdir, say)
    if hosts.is_process_zero():
      resume.save_config(config, workdir)
  same_start.require_same_data(corpus, tokens, workdir)
  describe_run(config, corpus, say)

  flops = run_cost.training_flops(config)
  # Before the loop: a CPU's peak is measured, and needs the cores to itself.
  hardware.peak_flops()
  with jax.set_mesh(mesh.make_mesh(**dataclasses.asdict(config.mesh))):
    if config.model.memory and jax.device_count() > 1:
      model = config.model
      say(memory_tables.describe_table(model.sized_memory, model.dtype))
    prompt = prompt_of(config, tokens, template)
    if config.train.sample_tokens:
      check_sample(config, len(prompt))
    data = dataclasses.replace(
      training_data(config, corpus, tokens, say),
      ranked_by=ranked_texts.of_run(config, corpus, tokens),
    )
    outcome = loop.fit(
      config,
      workdir,
      data,
      reporter,
      lambda speed: hardware.utilisation(speed * flops, jax.device_count()),
      functools.partial(adapters.load_base, config),
    )
    if outcome.validation is None:
      return
    if data.ranked_by:
      args = config, outcome.params, data.ranked_by, reporter
      trained_rows.tell_of_moved_reads(*args)
    if config.train.sample_tokens:
      try:
        write_sample(config, workdir, outcome.params, tokens, prompt, say)
      except UserError as error:  # All that counts has been kept before.
        say(f'The sample is missing: {error}')
  if not hosts.is_process_zero():
    return
  if data.pairs:
    for line in data.pairs.baselines():
      say(line)
  of_text = config.multimodal is None
  compressed = compression.bits_per_byte(corpus) if of_text else {}
  for name, bits in compressed.items():
    say(f'{name} -9 on the same text: {bits:.4f} bits/byte')
  try:
    draw(config, workdir, outcome.validation, compressed, say)
  except UserError as error:
    # The run itself is whole: pictures can be drawn later.
    say(f'No pictures: {error}')


def describe_run(config: Config, corpus: Corpus, say) -> None:
  parameters = run_cost.parameters(config)
  flops, device = run_cost.forward_flops(config), jax.devices()[0]
  batch, unit = config.data.batch_size, 'pair'
  if config.multimodal is None:
    batch, unit = batch * config.data.seq_len, 'token'
  say(
    f'{parameters.total / 1e6:.2f}M parameters, of which '
    f'{parameters.values / 1e6:.2f}M are values of memory layers; '
    f'{flops / 1e6:.2f} MFLOPs a {unit} forward; {batch:,} {unit}s a step.'
  )
  held_out = f'validation text {corpus.validation_bytes / 1e6:.2f} MB'
  if config.multimodal:
    held_out = f'{len(corpus.validation):,} pairs to validate'
  say(
    f'{jax.device_count()} x {device.device_kind}, JAX {jax.__version__}; '
    f'{held_out}.'
  )


def prompt_of(
  config: Config, tokens: tokenizer.Tokenizer, template: ChatTemplate | None
) -> np.ndarray:
  """What the sample goes on from; what a user says where chats are learned."""
  prompt = config.train.sample_prompt
  if template is None:
    return text.encode_prompt(tokens, prompt)
  try:
    return template.tokens([{'role': 'user', 'content': prompt}], tokens)
  except RefusedError as error:
    raise UserError(
      f'train.sample_prompt = {prompt!r} is no message to begin with: '
      f'{error} Set train.sample_tokens=0 for no sample.'
    ) from error


def check_sample(config: Config, num_tokens: int) -> None:
  """Refuses a sample that won't fit into memory, before hours of training."""
  init = functools.partial(init_params, config.model, jax.random.key(0))
  decoding.check_room(
    config.model,
    lambda: mesh.abstract(init, mesh=jax.sharding.get_mesh()),
    mesh.num_token_shards(),
    num_tokens,
    config.train.sample_tokens,
    SAMPLING,
    name='train.sample_tokens',
  )


def write_sample(
  config: Config,
  workdir: str,
  params: dict,
  tokens: tokenizer.Tokenizer,
  ids: np.ndarray,
  say,
) -> None:
  """Shows what the model makes of the prompt, and adds it to the samples."""
  prompt = config.train.sample_prompt
  say('Compiling generation ...')
  # One row for each piece of the batch, as the mesh splits rows evenly.
  drawn = decoding.generate_tokens(
    config.model,
    params,
    [ids] * mesh.num_token_shards(),
    config.train.sample_tokens,
    SAMPLING,
    config.train.seed,
  )
  written = ''.join(
    text.stream_text((int(row[0]) for row in drawn), tokens, ids)
  )
  say(f'A sample:\n{prompt}{written}')
  if not hosts.is_process_zero():
    return
  try:
    workdir_lib.append_sample(workdir, {'prompt': prompt, 'text': written})
  except UserError as error:
    say(f'The sample was not kept: {error}')


def draw(
  config: Config,
  workdir: str,
  validation: Validation,
  compressed: dict[str, float],
  say,
) -> None:
  files = workdir_lib.Files(workdir)
  with workdir_lib.write_errors(workdir):
    run_pictures.save_pass(files.folder, validation.slot_counts, compressed)
  drawn = run_pictures.draw(
    files.folder,
    metrics.read_rows(workdir),
    files.folder / workdir_lib.PLOTS,
    block.placements(config.model),
    say,
  )
  files.sync()
  names = ', '.join(f'{workdir}/{workdir_lib.PLOTS}/{p.name}' for p in drawn)
  say(f'Plots: {names}')
