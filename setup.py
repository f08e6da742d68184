# SPDX-License-Identifier: Apache-2.0
"""The packages; all else is in setup.cfg."""

import setuptools

setuptools.setup(
  packages=[
    *setuptools.find_packages(include=['jaxsparse*']),
    'jaxsparse.recipes',
    'jaxsparse.recipes.compare',
  ],
  # In a checkout recipes lie where one sees them first.
  package_dir={'jaxsparse.recipes': 'configs'},
)
