# SPDX-License-Identifier: Apache-2.0
"""How fast and how large: `python -m jaxsparse bench NAME`."""
