"""Eight CPU devices, strict promotion, shapes checked at run time."""

import os

# Compiling takes most of the suite's time, and programs this small gain little
# from LLVM's optimization; read when JAX first starts its backend.
os.environ['XLA_FLAGS'] = ' '.join(
  [os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0']
)

import jax
import jaxtyping

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_rank_promotion', 'raise')

jaxtyping.install_import_hook('jaxsparse', 'beartype.beartype')
