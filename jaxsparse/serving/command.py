# SPDX-License-Identifier: Apache-2.0
"""Serves a trained model over HTTP: model-server --model-path WORKDIR.

Clients of OpenAI's protocol work with it, and a page at / writes in a browser.
SIGTERM finishes what runs and ends the process with 0; a second one ends it at
once.
"""

import argparse
import contextlib
import ipaddress
import logging
import os
import pathlib
from collections.abc import Sequence

from jaxsparse.config import tables
from jaxsparse.config.errors import UserError, require
from jaxsparse.config.model import KV_CACHES
from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.inference import row_cache, served_adapters
from jaxsparse.inference.quantize import QUANTIZE_HELP, parse
from jaxsparse.run import trained
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser
from jaxsparse.serving import pictures
from jaxsparse.serving.model import Model, Sizes
from jaxsparse.serving.serve import listen, say, serve
from jaxsparse.serving.service import Limits, Service

KEY_VARIABLE = 'MODEL_SERVER_API_KEY'

_MIB = 1 << 20
# Of a body with text alone.
BODY_MIB = 4


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
  parser = Parser(
    prog='model-server',
    description='Serve a model that train.py trained to clients of '
    "OpenAI's protocol.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add(
    '--model-path',
    required=True,
    default=argparse.SUPPRESS,
    help='folder of the training run, or its checkpoints/',
  )
  add('--host', default='127.0.0.1', help='address to listen at')
  add('--port', type=int, default=8080, help='0 takes a free one')
  add(
    '--step',
    type=trained.to_step,
    help='checkpoint to serve, or "best": the one of the lowest validation '
    'loss; %(default)s: the newest',
  )
  add('--served-name', help="the model's name; %(default)s: the folder's")
  add('--slots', type=int, help='sequences at once; %(default)s: as many as '
      'fit into memory, at most 16')  # fmt: skip
  add(
    '--max-len',
    type=int,
    help='tokens of prompt and answer together; %(default)s: as many as in '
    'training',
  )
  add('--chunk', type=int, default=256, help='tokens of a prompt read at once')
  add(
    '--history-blocks',
    type=int,
    help='blocks that sparse attention keeps between the first one and its '
    'window, with which prompts may be of any length; 0: what --max-len holds; '
    '%(default)s: all',
  )
  add(
    '--kv',
    choices=KV_CACHES,
    help='how keys and values of earlier tokens are kept: exact, or in '
    'int8, in a quarter to half of the memory; %(default)s: as the run has it',
  )
  add('--max-queue', type=int, help='requests that may wait; %(default)s: 4 '
      'for each slot')  # fmt: skip
  add(
    '--max-queue-tokens',
    type=int,
    help='tokens of their prompts together; %(default)s: any number',
  )
  add(
    '--prefix-mib',
    type=int,
    default=256,
    help='memory for the beginnings of prompts that were read; 0: none',
  )
  add(
    '--memory-fraction',
    type=float,
    default=0.8,
    help='of free memory, for weights, slots and prefixes',
  )
  add(
    '--tables',
    choices=tables.STORES,
    default='',
    help='where the tables of memory layers lie: on the device, in host '
    'memory, or in mapped files, which take no memory; %(default)s: as the run '
    'has them',
  )
  add('--row-cache', default='', metavar='ROWS|SIZE', help=row_cache.HELP)
  add('--devices', type=int, default=1, help='over which the model is divided')
  add(
    '--adapters',
    nargs='+',
    action='extend',
    default=[],
    metavar='NAME=DIR',
    help='adapters beside the model, such as cats=RUN/adapters/cats: a request '
    'chooses one by its "model"',
  )
  add(
    '--force',
    action='store_true',
    help='serve adapters that were trained beside other parameters, too',
  )
  add('--quantize', default='', metavar='HOW', help=QUANTIZE_HELP)
  add(
    '--api-key-file',
    help='holds the key that clients must send; %(default)s: the variable '
    f'{KEY_VARIABLE}, and without it no key',
  )
  add(
    '--chat-template',
    help='a file with a Jinja template of chats; %(default)s: the one that the '
    'model was published with',
  )
  add(
    '--cors-origin',
    action='append',
    default=[],
    help='a web page that may read answers, such as https://example.com',
  )
  add(
    '--body-mib',
    type=int,
    help=f'longest body of a request; %(default)s: {BODY_MIB}, and of a model '
    f'that sees pictures {pictures.BODY_MIB}',
  )
  add('--request-seconds', type=float, default=600, help='longest request')
  add(
    '--drain-seconds',
    type=float,
    default=30,
    help='after SIGTERM, for what runs to finish',
  )
  add('--log-text', action='store_true', help='log what was written, too')
  arguments = parser.parse_args(argv)
  _check(arguments)
  return arguments


def _check(arguments: argparse.Namespace) -> None:
  require(
    0 <= arguments.port < 1 << 16,
    f'--port must be within 0 and 65535, got {arguments.port}.',
  )
  for name, least in (
    ('slots', 1),
    ('max_len', 2),
    ('chunk', 1),
    ('history_blocks', 0),
    ('max_queue', 0),
    ('max_queue_tokens', 1),
    ('prefix_mib', 0),
    ('devices', 1),
    ('body_mib', 1),
    ('request_seconds', 1),
    ('drain_seconds', 0),
  ):
    value = getattr(arguments, name)
    require(
      value is None or value >= least,
      f'--{name.replace("_", "-")} must be at least {least}, got {value}.',
    )
  require(
    0 < arguments.memory_fraction <= 1,
    '--memory-fraction must be above 0 and at most 1, got '
    f'{arguments.memory_fraction}.',
  )


def main(argv: Sequence[str]) -> None:
  arguments = parse_arguments(argv)
  _log_to_stderr()
  workdir = _workdir(arguments.model_path)
  name = arguments.served_name or pathlib.Path(workdir).resolve().name
  adapters = served_adapters.parse(arguments.adapters)
  served_adapters.check_names(adapters, name)
  key = read_key(arguments.api_key_file)
  if arguments.chat_template is not None:
    template = ChatTemplate.read(arguments.chat_template, '--chat-template')
  else:
    template = ChatTemplate.of_workdir(workdir)
  # Before the model, which takes long: a port that is taken is told at once.
  listener = listen(arguments.host, arguments.port)
  with contextlib.closing(listener):
    model = Model(
      workdir,
      Sizes(
        step=arguments.step,
        slots=arguments.slots,
        length=arguments.max_len,
        chunk=arguments.chunk,
        history_blocks=arguments.history_blocks,
        kv=arguments.kv,
        max_queue=arguments.max_queue,
        max_queue_tokens=arguments.max_queue_tokens,
        prefix_bytes=arguments.prefix_mib * _MIB,
        memory_fraction=arguments.memory_fraction,
        devices=arguments.devices,
        tables=arguments.tables,
        cached_rows=row_cache.parse(arguments.row_cache, '--row-cache'),
        quantization=parse(arguments.quantize),
        adapters=adapters,
        is_forced=arguments.force,
      ),
      say,
    )
    usual = pictures.BODY_MIB if model.pictures else BODY_MIB
    service = Service(
      model.engine,
      model.tokenizer,
      name=name,
      vocab_size=model.vocab_size,
      step=lambda: model.step,
      template=template or (pictures.CAPTIONS if model.pictures else None),
      limits=Limits(
        body_bytes=(arguments.body_mib or usual) * _MIB,
        request_seconds=arguments.request_seconds,
      ),
      metrics=model.metrics,
      logs_text=arguments.log_text,
      adapters=tuple(adapters),
      reload=model.reload,
      pictures=model.pictures,
    )
    address = listener.getsockname()
    url = f'http://{_bracketed(address[0])}:{address[1]}'
    if not key and not ipaddress.ip_address(address[0]).is_loopback:
      say(
        f'warning: {url} is open to all who reach it: set {KEY_VARIABLE} or '
        '--api-key-file.'
      )
    model.on_ready = lambda line: say(f'{name}: {line}, at {url}')
    say(f'{name} is being loaded; {url}/health tells how far.')
    serve(
      service,
      listener,
      key=key,
      origins=arguments.cors_origin,
      drain_seconds=arguments.drain_seconds,
    )


def read_key(path: str | None) -> str:
  """The key that clients must send: of a file, or of the environment.

  A flag would show it to all who list processes.

  Raises:
    UserError: there is none in the file, or it can't stand in a header.
  """
  source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, '')
  if path is not None:
    source = f'--api-key-file={path}'
    try:
      key = pathlib.Path(path).expanduser().read_text('utf-8').strip()
    except (OSError, ValueError, RuntimeError) as error:
      reason = getattr(error, 'strerror', None) or type(error).__name__
      raise UserError(f"{source} can't be read ({reason}).") from error
    require(bool(key), f'{source} is empty: write a key into it.')
  require(
    key.isascii() and (not key or key.isprintable()) and key == key.strip(),
    f'{source} must hold a key of printable ASCII characters.',
  )
  return key


def _workdir(path: str) -> str:
  """The workdir of a path that may be its checkpoints/."""
  found = pathlib.Path(workdir_lib.expanded(path))
  if found.resolve().name == workdir_lib.CHECKPOINTS:
    found = found.resolve().parent
  return str(found)


def _bracketed(host: str) -> str:
  return f'[{host}]' if ':' in host else host


def _log_to_stderr() -> None:
  # A disk that is full must not end requests.
  logging.raiseExceptions = False
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
  for name, level in (
    ('jaxsparse', logging.INFO),
    ('uvicorn.error', logging.ERROR),
  ):
    logger = logging.getLogger(name)
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
