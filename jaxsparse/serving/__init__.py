# SPDX-License-Identifier: Apache-2.0
"""A trained model over HTTP, as clients of OpenAI's protocol expect it."""
