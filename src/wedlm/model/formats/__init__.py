# SPDX-License-Identifier: Apache-2.0
"""The file formats of checkpoints, tokenizers and chat templates."""
