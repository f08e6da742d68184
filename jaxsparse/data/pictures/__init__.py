# SPDX-License-Identifier: Apache-2.0
"""Pictures with their texts: read, drawn, split and made into batches."""
