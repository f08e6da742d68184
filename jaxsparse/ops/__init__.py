# SPDX-License-Identifier: Apache-2.0
"""Pure functions on arrays, each with its reference beside it."""
