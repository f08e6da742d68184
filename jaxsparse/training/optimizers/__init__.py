# SPDX-License-Identifier: Apache-2.0
"""Optax transformations that know no model."""
