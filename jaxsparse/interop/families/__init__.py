# SPDX-License-Identifier: Apache-2.0
"""Families of published models: what their config says, where leaves lie.

Each module has `MODEL_TYPES`, `to_config` and `layout`, and where there is a
way out `to_json`.
"""
