# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices, strict promotion, shapes checked at run time."""

import gc
import os
import tempfile

import jaxlib

# Compiling takes most of the suite's time, and programs this small gain little
# from optimization or from modules in parts. Without its emitters of fusions it
# takes half of the time; later versions have no others and refuse the flag.
# Read when JAX first starts its backend.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_cpu_parallel_codegen_split_count=1',
    '--xla_cpu_use_fusion_emitters=false'
    if jaxlib.version.__version_info__ < (0, 11)
    else '',
  ]
)
# XLA carries the source lines of each operation from pass to pass, a tenth of
# compiling; the processes that tests start inherit this, too.
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'
# Many cases build the same program anew, and so do the other worker and the
# processes that tests start: a fifth of the suite's time.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _programs = tempfile.TemporaryDirectory(prefix='jaxsparse-tests-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _programs.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import jaxtyping

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_rank_promotion', 'raise')

_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_if_annotated(**options):
  """`jaxtyped`, but for what has no annotations: there is nothing to check.

  Inner functions are prepared to be checked each time they are defined: a
  twelfth of the time that tests of models spent in Python.
  """
  decorate = _jaxtyped(**options)
  return lambda x: decorate(x) if getattr(x, '__annotations__', True) else x


jaxtyping.jaxtyped = _jaxtyped_if_annotated

# Where shapes are annotated. Other types pyright reads, and preparing a module
# to be checked takes longer than importing it.
jaxtyping.install_import_hook(
  ['jaxsparse.nn', 'jaxsparse.ops', 'jaxsparse.training.optimizers'],
  'beartype.beartype',
)


def pytest_collection_modifyitems(items):
  # Training's modules take longest: begun last, one worker would wait for them.
  items.sort(key=lambda item: item.path, reverse=True)


def pytest_collection_finish():
  # Tracing makes so many objects that collecting those of the imports again and
  # again takes a sixteenth of the suite's time.
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)
